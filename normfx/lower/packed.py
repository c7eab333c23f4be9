"""Kept weights in the layout oneDNN multiplies by, without freezing anything.

Inductor packs weights only as constants. Here a linear layer's weight is one more kept value: the graph computes
`pack(W)`, which the store takes out, and multiplies by it in `packed_linear`. What the graph is given is a handle of
one entry at a fixed address; the packed tensor that it stands for is found in weights/handles.py, and exchanged when
W changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.fx import GraphModule, Node

from normfx.compat import onednn
from normfx.graph.aliasing import escaping, storages_of
from normfx.graph.calls import add_call
from normfx.graph.nodes import BAKED, parameter_only, tensor
from normfx.graph.regions import is_autocast
from normfx.ir.ops import define
from normfx.lower.gemm import packed_is_faster
from normfx.lower.linear import Product, linear_product
from normfx.weights.handles import value_of
from normfx.weights.kept import folded, records_gradients

ROWS = 128
"""Rows of the input that oneDNN is told to expect when it chooses a layout, unless it is one; any number may come."""

LEAST = {torch.float32: 2**16, torch.bfloat16: 2**15}
"""Entries of the smallest weights worth packing: the call itself costs 10 µs more than a plain product."""


@functools.cache
def _multiply() -> Any:
    """Not looked up at import: a torch that was built without oneDNN has no such op, and packs nothing."""
    return onednn.linear()


def _pack(weight: Tensor, out: int, rows: int) -> Tensor:
    """A matrix whose output features lie along dimension `out` → the same, packed for so many rows."""
    return onednn.pack((weight.t() if out else weight).contiguous(), rows)


def _packed_linear(x: Tensor, handle: Tensor, bias: Tensor | None, features: int) -> Tensor:
    result: Tensor = _multiply()(x, value_of(handle), bias, "none", [], "")
    return result


PACK = define("pack(Tensor weight, int out, int rows) -> Tensor", _pack, "CPU")
PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor handle, Tensor? bias, int features) -> Tensor",
    _packed_linear,
    "CPU",
    (torch.Tag.flexible_layout,),
)
# what a graph is given instead of a packed weight is its handle
library.register_fake(PACK, lambda weight, out, rows: weight.new_empty(1, dtype=torch.int64))
library.register_fake(PACKED_LINEAR, lambda x, handle, bias, features: x.new_empty((*x.shape[:-1], features)))


def pack_linears(gm: GraphModule, free: frozenset[Node], plain_row: Callable[[torch.dtype], bool]) -> None:
    """Let the linear layers of a graph multiply by packed weights, in place, where that is faster.

    free:      parameters that may be kept. Every packed weight is one of `kept_values` afterwards.
    plain_row: whether products of one row are as fast by weights of a dtype that are not packed
    """
    graph = gm.graph
    products = {node: p for node in graph.nodes if (p := linear_product(node)) and _is_large(p)}
    if not products or is_autocast(graph) or records_gradients(graph):
        return
    known = parameter_only(graph, free)
    products = {node: p for node, p in products.items() if p.weight in known}
    storages = storages_of(graph)
    outside, kept = escaping(graph, storages), folded(known)
    packs: dict[tuple[Node, int, int], Node] = {}
    for node, product in products.items():
        x, weight, bias, out = product
        fake = tensor(weight)
        if storages[weight] & outside or not (weight in free or weight in kept) or not packed_is_faster(fake.dtype):
            continue
        if product.of_one_row and plain_row(fake.dtype):
            continue
        form = weight, out, 1 if product.of_one_row else ROWS
        if form not in packs:
            with graph.inserting_before(node):
                packs[form] = add_call(graph, PACK, form, node)
            packs[form].meta[BAKED] = True
        with graph.inserting_before(node):
            new = add_call(graph, PACKED_LINEAR, (x, packs[form], bias, int(fake.shape[out])), node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def unpack(gm: GraphModule, node: Node) -> None:
    """Let the products by a packed weight multiply by the weight itself again, in place; other nodes stay."""
    if node.target is not PACK:
        return
    weight, out, _ = node.args
    for product in list(node.users):
        x, _, bias, _ = product.args
        with gm.graph.inserting_before(product):
            if out:
                new = add_call(gm.graph, torch.ops.aten.addmm.default, (bias, x, weight), product)
            else:
                new = add_call(gm.graph, torch.ops.aten.linear.default, (x, weight, bias), product)
        product.replace_all_uses_with(new)
        gm.graph.erase_node(product)
    gm.graph.erase_node(node)


def _is_large(product: Product) -> bool:
    fake = tensor(product.weight)
    return fake.numel() >= LEAST.get(fake.dtype, float("inf"))
