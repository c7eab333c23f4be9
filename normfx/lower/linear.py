"""Linear layers of a graph on the CPU, however they are written."""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Node

from normfx.graph.nodes import arguments, entries, op_name, shape, value


class Product(NamedTuple):
    """A linear layer: x times a matrix whose output features lie along dimension `out`, plus a vector."""

    x: Node
    weight: Node
    bias: Node | None
    out: int

    @property
    def of_one_row(self) -> bool:
        return bool(entries(shape(self.x)[:-1]) == 1)

    @property
    def fixed_rows(self) -> int:
        """The number of rows that x has, 0 where the graph serves several numbers of them."""
        rows = entries(shape(self.x)[:-1])
        return int(rows) if rows.is_Integer else 0


def linear_product(node: Node) -> Product | None:
    """A linear layer on the CPU, all of one dtype; under autocast its output has another."""
    name = op_name(node)
    if name not in ("aten::linear", "aten::addmm"):
        return None
    given = arguments(node)
    if name == "aten::linear":
        product = Product(given["input"], given["weight"], given["bias"], 0)
    elif given["alpha"] == given["beta"] == 1:
        product = Product(given["mat1"], given["mat2"], given["self"], 1)
    else:
        return None
    x, weight, bias, result = map(value, (*product[:3], node))
    if x is None or weight is None or result is None or x.ndim < 2 or weight.ndim != 2:
        return None
    if bias is not None and bias.shape != (weight.shape[product.out],):
        return None
    tensors = [x, weight, result, *([bias] if bias is not None else [])]
    same = all(t.dtype == weight.dtype and t.device.type == "cpu" for t in tensors)
    return product if same else None
