"""Let Inductor's products on the CPU run the faster of two ways, shape by shape.

ATen multiplies float32 matrices by the BLAS library that torch was built with (on x86 MKL). oneDNN multiplies them too,
and which of the two is faster depends on the processor, the shape and the layout. Bfloat16 matrices are multiplied as
they are, or in float32 and rounded once (lower/wide.py says why that is as exact). Kept and frozen weights are packed
for oneDNN before AOTAutograd (lower/packed.py, lower/gemm.py). All other products are in the graphs that Inductor
lowers: those of a training step, forward and backward, and those with weights that the graph computes. This pass
runs after all of Inductor's own passes, so that decompositions, the partition into forward and backward, and fusions
are those of Inductor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, library
from torch.fx import Graph, Node

from normfx.ir.ops import define
from normfx.lower import rates
from normfx.lower.gemm import onednn_works
from normfx.lower.passes import HOOK, LastPass, digest, hinted, setting
from normfx.lower.rates import Product

LEAST = 2**26
"""Floating-point operations of the smallest products considered: the call itself costs 10 µs more than ATen's."""

LEAST_READ = 2**18
"""Entries of the smallest matrix that products of few rows are considered for: reading it takes longer than that."""


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return rates.onednn(a, b) if a.numel() and b.numel() else torch.mm(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return rates.onednn(a, b, bias) if a.numel() and b.numel() else torch.addmm(bias, a, b)


_TAGS = (torch.Tag.flexible_layout,)
MM = define("mm(Tensor a, Tensor b) -> Tensor", _mm, "CPU", _TAGS)
ADDMM = define("addmm(Tensor bias, Tensor a, Tensor b) -> Tensor", _addmm, "CPU", _TAGS)
library.register_fake(MM, lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
library.register_fake(ADDMM, lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]))


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    return rates.wide(a, b) if a.numel() and b.numel() else torch.mm(a, b)


def _wide_addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return rates.wide(a, b, bias) if a.numel() and b.numel() else torch.addmm(bias, a, b)


WIDE_MM = define("wide_mm(Tensor a, Tensor b) -> Tensor", _wide_mm, "CPU", _TAGS)
WIDE_ADDMM = define("wide_addmm(Tensor bias, Tensor a, Tensor b) -> Tensor", _wide_addmm, "CPU", _TAGS)
library.register_fake(WIDE_MM, lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
library.register_fake(WIDE_ADDMM, lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]))

REPLACED = {
    torch.float32: {torch.ops.aten.mm.default: MM, torch.ops.aten.addmm.default: ADDMM},
    torch.bfloat16: {torch.ops.aten.mm.default: WIDE_MM, torch.ops.aten.addmm.default: WIDE_ADDMM},
}


def with_products(patches: Mapping[str, Any], products: str = "auto") -> dict[str, Any]:
    """Inductor's config patches, with the pass after the one that the user set, if one is set.

    They stay as they are where oneDNN cannot multiply, and, unless products is "onednn", where Inductor compares
    libraries itself (`max_autotune`).

    products: "auto", "aten" or "onednn", as in normfx.options
    """
    if not _replaces(patches, products):
        return dict(patches)
    return {**patches, HOOK: FasterProducts(products == "auto", setting(patches, HOOK))}


def plain_rows(patches: Mapping[str, Any], products: str) -> Callable[[torch.dtype], bool]:
    """Says whether products of one row by weights of a dtype need no packing under these options: the pass lets oneDNN
    multiply by the weights as they are, which is as fast and takes no memory."""

    def plain_row(dtype: torch.dtype) -> bool:
        return dtype == torch.float32 and _replaces(patches, products) and rates.plain_row_is_fast()

    return plain_row


def _replaces(patches: Mapping[str, Any], products: str) -> bool:
    tuned = products == "auto" and (setting(patches, "max_autotune") or setting(patches, "max_autotune_gemm"))
    return products != "aten" and not tuned and onednn_works(torch.float32)


class FasterProducts(LastPass):
    """Replaces products by oneDNN's.

    measured: only where these were measured to be faster
    first:    a pass that runs before this one, or several
    """

    def __init__(self, measured: bool, first: Any = None) -> None:
        super().__init__(first)
        self.measured = measured

    def change(self, graph: Graph) -> None:
        for node in graph.nodes:
            product = _product(node, torch.float32)
            if product is not None and (not self.measured or rates.onednn_is_faster(product)):
                node.target = REPLACED[torch.float32][node.target]
            product = _product(node, torch.bfloat16) if self.measured else None
            if product is not None and product.rows > rates.FEW_ROWS and rates.wide_is_faster(product):
                node.target = REPLACED[torch.bfloat16][node.target]

    def key(self) -> tuple[Any, ...]:
        return digest(inspect.getmodule(FasterProducts), rates), self.measured


def _product(node: Node, dtype: torch.dtype) -> Product | None:
    """A product of two matrices of a dtype on the CPU, plus a vector or not, of known sizes and worth a look."""
    if node.target not in REPLACED[dtype] or node.kwargs:
        return None
    values: list[Any] = [arg.meta.get("val") if isinstance(arg, Node) else None for arg in node.args]
    if not all(isinstance(v, Tensor) and v.dtype == dtype and v.device.type == "cpu" for v in values):
        return None
    *bias, a, b = values
    if bias and (bias[0].ndim != 1 or bias[0].shape[0] != b.shape[1]):
        return None
    if _overlaps(a) or _overlaps(b):
        return None
    rows, inner, columns = hinted(a.shape[0]), hinted(a.shape[1]), hinted(b.shape[1])
    if rows is None or inner is None or columns is None:
        return None
    read = rows <= rates.FEW_ROWS and inner * columns >= LEAST_READ
    if not read and 2 * rows * inner * columns < LEAST:
        return None
    return Product(rows, inner, columns, _is_transposed(a), _is_transposed(b))


def _overlaps(matrix: Tensor) -> bool:
    """Whether entries share memory, as those of windows over a vector do: oneDNN takes no such matrix. It
    takes one row, or one column, that stands for all."""
    rows, columns, down, right = (hinted(number) or 0 for number in (*matrix.shape, *matrix.stride()))
    return 1 not in (rows, columns) and down < right * columns and right < down * rows


def _is_transposed(matrix: Tensor) -> bool:
    """Whether columns are contiguous, not rows. Known strides only: a symbolic one is that of a contiguous matrix."""
    return isinstance(matrix.stride(0), int) and matrix.stride(0) == 1 and matrix.shape[0] != 1
