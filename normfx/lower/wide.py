"""Compute products and attention of bfloat16 values in float32, where this machine multiplies float32 matrices faster.

    linear(x, W, c)  ->  round(linear(float(x), float(W), float(c)))

A product of two bfloat16 numbers is a float32 number, and libraries add such products in float32 too, so both round to
bfloat16 once: they differ by the order of the sum alone. A value that goes from one such op to another through views is
not rounded in between. Processors whose bfloat16 instructions run at half the rate of float32's, or that have none,
are about twice as fast this way. `float(W)` is a kept value (and packed, lower/packed.py): the weight takes twice the
memory that it would take packed in bfloat16. Weights whose gradient is wanted are left to lower/products.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.graph.aliasing import escaping, mutated, storages_of
from normfx.graph.calls import add_call
from normfx.graph.nodes import BAKED, arguments, entries, is_getitem, op_name, parameter_only, shape, size_hint, value
from normfx.graph.regions import is_autocast
from normfx.graph.views import settle
from normfx.lower.linear import Product, linear_product
from normfx.lower.wide_speed import ROWS, attention_is_faster, products_are_faster
from normfx.weights.kept import folded, records_gradients

WIDE = "normfx_wide"
"""Node meta key of a cast that this pass wrote."""

CAST = torch.ops.prims.convert_element_type.default
ATTENTION = "aten::scaled_dot_product_attention"

LEAST = 2**15
"""Entries of the smallest weights worth two casts."""

VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view", "reshape", "transpose.int", "permute", "unsqueeze", "squeeze.dim", "expand", "select.int",
        "slice.Tensor", "split.Tensor", "split_with_sizes", "chunk", "unbind.int", "contiguous",
    )
)  # fmt: skip
"""Ops that move entries and do not compute; their first argument is what they move."""


def widen(gm: GraphModule, free: frozenset[Node]) -> None:
    """Let the linear layers by keepable weights `free`, and attention, compute in float32, in place, where that is
    faster."""
    graph = gm.graph
    if is_autocast(graph) or records_gradients(graph):
        return
    known = parameter_only(graph, free)
    storages = storages_of(graph)
    outside, kept = escaping(graph, storages), folded(known)
    edit = _Widening(graph, known, mutated(graph))
    for node in list(graph.nodes):
        product = linear_product(node)
        if product is not None and product.weight in known and (product.weight in free or product.weight in kept):
            if not storages[product.weight] & outside and may_be_wide(product.weight) and _has_rows(product):
                edit.linear(node, product)
        elif _is_attention(node) and attention_is_faster():
            edit.attention(node)
    if edit.changed:
        graph.lint()
        settle(gm)


def narrow(gm: GraphModule, weight: Node) -> None:
    """Let the products by a weight that was cast to float32 multiply by the weight itself again, in place; what was not
    cast by this pass stays."""
    if not weight.meta.get(WIDE):
        return
    for node in list(weight.users):
        given: list[Any] = [_narrowed(gm.graph, arg, node) for arg in node.args]
        with gm.graph.inserting_before(node):
            new = add_call(gm.graph, node.target, tuple(given), node)
            wide = add_call(gm.graph, CAST, (new, torch.float32), node)
        node.replace_all_uses_with(wide)
        gm.graph.erase_node(node)


def is_wide(weight: Node) -> bool:
    """Whether a weight is another one cast to float32 by this pass."""
    return bool(weight.meta.get(WIDE))


def _narrowed(graph: Graph, arg: Any, like: Node) -> Any:
    """A float32 operand as it was, in bfloat16."""
    if not isinstance(arg, Node):
        return arg
    if arg.meta.get(WIDE):
        return arg.args[0]
    with graph.inserting_before(like):
        return add_call(graph, CAST, (arg, torch.bfloat16), like)


class _Widening:
    """Rewrites ops of one graph, each operand cast once."""

    def __init__(self, graph: Graph, known: frozenset[Node], written: frozenset[Node]) -> None:
        self.graph, self.known, self.written = graph, known, written
        self.changed = False
        self._wide: dict[Node, Node] = {}

    def linear(self, node: Node, product: Product) -> None:
        x, weight, bias, out = product
        operands = self.wide(x, node), self.wide(weight, node), None if bias is None else self.wide(bias, node)
        with self.graph.inserting_before(node):
            if out:
                new = add_call(self.graph, torch.ops.aten.addmm.default, (operands[2], *operands[:2]), node)
            else:
                new = add_call(self.graph, torch.ops.aten.linear.default, operands, node)
        self._replace(node, new)

    def attention(self, node: Node) -> None:
        given = arguments(node)
        mask = given["attn_mask"]
        if mask is not None and _is_bfloat16(mask):
            mask = self.wide(mask, node)
        operands = (*(self.wide(given[name], node) for name in ("query", "key", "value")), mask)
        rest = {name: given[name] for name in ("is_causal", "scale", "enable_gqa")}
        with self.graph.inserting_before(node):
            new = add_call(self.graph, node.target, operands, node, **rest)
        self._replace(node, new)

    def wide(self, node: Node, reader: Node) -> Node:
        """The float32 values of a node: what it was rounded from, through views, else its entries cast. A value that is
        written in place is cast where it is read, for each reader."""
        if node in self.written:
            with self.graph.inserting_before(reader):
                return add_call(self.graph, CAST, (node, torch.float32), reader)
        if node not in self._wide:
            self._wide[node] = self._viewed(node) if self._comes_from_wide(node) else self._cast(node)
        return self._wide[node]

    def _comes_from_wide(self, node: Node) -> bool:
        """Whether a value is one that was computed in float32 and rounded, or a view of one."""
        while node not in self._wide:
            if not (op_name(node) in VIEWS or is_getitem(node)) or not isinstance(node.args[0], Node):
                return False
            node = node.args[0]
        return True

    def _viewed(self, node: Node) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        if source not in self._wide:
            self._wide[source] = self._viewed(source)
        with self.graph.inserting_after(node):
            new = add_call(self.graph, node.target, (self._wide[source], *node.args[1:]), node, **node.kwargs)
        return new

    def _cast(self, node: Node) -> Node:
        with self.graph.inserting_after(node):
            new = add_call(self.graph, CAST, (node, torch.float32), node)
        new.meta[WIDE] = True
        if node in self.known:
            new.meta[BAKED] = True
        return new

    def _replace(self, node: Node, new: Node) -> None:
        """Readers get the rounded value; those that are widened later get the value itself."""
        with self.graph.inserting_before(node):
            rounded = add_call(self.graph, CAST, (new, torch.bfloat16), node)
        node.replace_all_uses_with(rounded)
        self.graph.erase_node(node)
        if node not in self.written:
            self._wide[rounded] = new
        self.changed = True


def may_be_wide(weight: Node) -> bool:
    """Whether a weight is worth casting to float32 where enough rows are multiplied by it."""
    fake = value(weight)
    if fake is None or not _is_bfloat16(weight):
        return False
    size = entries(shape(weight))
    return size.is_Integer and bool(size >= LEAST) and products_are_faster()


def _has_rows(product: Product) -> bool:
    return size_hint(entries(shape(product.x)[:-1]), (product.x,)) >= ROWS


def _is_attention(node: Node) -> bool:
    """Attention on the CPU of bfloat16 queries, enough of them, without dropout."""
    if op_name(node) != ATTENTION:
        return False
    given = arguments(node)
    query = given["query"]
    if given["dropout_p"] != 0.0 or not all(_is_bfloat16(given[name]) for name in ("query", "key", "value")):
        return False
    return size_hint(entries(shape(query)[-2:-1]), (query,)) >= ROWS


def _is_bfloat16(node: Any) -> bool:
    fake = value(node)
    return fake is not None and fake.dtype == torch.bfloat16 and fake.device.type == "cpu"
