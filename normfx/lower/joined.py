"""Linear layers of one value in one product, by their weights one below the other, where that is faster.

    x W₁ᵀ + b₁, x W₂ᵀ + b₂, …  =  the parts of  x [W₁; W₂; …]ᵀ + [b₁; b₂; …]

Queries, keys and values of many models are three layers of one value. Each entry of the result is computed as before,
by the same numbers; one product has fewer calls and fills the cores better. The weight is a kept value that would be
packed in any case; it takes more memory only where a graph joins what another one, or another layer of the graph, keeps
apart. The parts are not contiguous: where that could be seen (the caller gets
one, or a view of one would fail) the layers stay apart.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat.tensors import FakeTensor
from normfx.graph.aliasing import may_leave, mutated, storages_of
from normfx.graph.calls import add_call
from normfx.graph.nodes import BAKED, entries, is_getitem, shape, size_hint, tensor
from normfx.graph.order import Order
from normfx.graph.regions import is_autocast
from normfx.graph.views import run_again, settle
from normfx.lower.gemm import packed_is_faster
from normfx.lower.linear import Product, linear_product
from normfx.lower.packing import Packable, is_packed_size, packable_weights
from normfx.lower.wide import is_wide
from normfx.weights.kept import records_gradients

JOINED = "normfx_joined"
"""Node meta key of a weight that is several ones, one below the other: the layers that it was made of."""

ROWS = 512
"""Rows from which the parts, whose rows lie far apart, cost attention more than one product saves."""

LARGEST = 80_000_000
"""Multiply-adds of a layer from which one product is no faster than several (docs/design-notes.md)."""

cat = torch.ops.aten.cat.default
split = torch.ops.aten.split_with_sizes.default


def join_linears(gm: GraphModule, free: frozenset[Node], plain_row: Callable[[torch.dtype], bool]) -> None:
    """Let layers of one value compute in one product, in place, where that is faster and their weights are packed.

    free:      parameters that may be kept
    plain_row: whether products of one row are as fast by weights of a dtype that are not packed
    """
    graph = gm.graph
    if is_autocast(graph) or records_gradients(graph):
        return
    products = {node: product for node in graph.nodes if (product := linear_product(node))}
    readers: dict[tuple[Node, bool], list[Node]] = {}
    for node, product in products.items():
        readers.setdefault((product.x, product.bias is None), []).append(node)
    groups = {key: nodes for key, nodes in readers.items() if len(nodes) > 1}
    if not groups:
        return
    packable, written = packable_weights(graph, free), mutated(graph)
    storages, order = storages_of(graph), Order(graph)
    decided = []
    for (x, _), nodes in groups.items():
        known = [
            node
            for node in nodes
            if x not in written
            and node not in packable.known
            and _may_join(products[node], packable, plain_row)
            and not may_leave(node, storages)
        ]
        near = [node for node in known if node is known[0] or order.can_lift(node, known[0])]
        members = _with_possible_views(graph, near, storages)
        several = len({_key(products[node]) for node in members}) > 1
        if several and all(order.can_lift(node, members[0]) for node in members[1:]):
            decided.append(members)
    made: dict[tuple[Any, ...], tuple[Node, Node | None]] = {}
    for members in decided:
        _join(graph, members, order, made)
    if decided:
        settle(gm)


def split_up(graph: Graph, packed: Node, layers: Sequence[Product]) -> None:
    """Let the layers of a joined weight compute for themselves again, in place, where it is packed but does not fit."""
    for product in list(packed.users):
        (parts,) = product.users  # written by `_join`
        for part in list(parts.users):
            index: Any = part.args[1]
            layer = layers[index]
            with graph.inserting_before(product):
                given = (product.args[0], _upright(graph, layer, product), layer.bias)
                part.replace_all_uses_with(add_call(graph, torch.ops.aten.linear.default, given, product))
            graph.erase_node(part)
        graph.erase_node(parts)
        graph.erase_node(product)
    graph.erase_node(packed)


def _may_join(product: Product, packable: Packable, plain_row: Callable[[torch.dtype], bool]) -> bool:
    """Whether a layer is small enough, and its weight packed in any case."""
    x, weight, bias, _ = product
    rows = size_hint(entries(shape(x)[:-1]), (x,))
    size, dtype = entries(shape(weight)), tensor(weight).dtype
    if not size.is_Integer or not is_packed_size(weight) or rows > ROWS or rows * size > LARGEST or is_wide(weight):
        return False
    if product.of_one_row and plain_row(dtype):
        return False
    packs = packed_is_faster(dtype)  # by oneDNN, which serves any number of rows; by MKL where that is faster still
    return packs and packable(weight) and (bias is None or packable(bias))


def _weights(product: Product) -> list[Node]:
    return [product.weight, *([product.bias] if product.bias is not None else [])]


def _with_possible_views(graph: Graph, nodes: Sequence[Node], storages: Mapping[Node, frozenset[Any]]) -> list[Node]:
    """Those whose views exist of a part of the joint result, too."""
    left = list(nodes)
    while len(left) > 1:
        ends = list(itertools.accumulate(int(tensor(node).shape[-1]) for node in left))
        possible = [n for n, end in zip(left, ends, strict=True) if _views_exist(graph, n, end, ends[-1], storages)]
        if len(possible) == len(left):
            return left
        left = possible
    return []


def _views_exist(graph: Graph, node: Node, end: int, width: int, storages: Mapping[Node, frozenset[Any]]) -> bool:
    """Whether every view of a result exists if its rows end at entry `end` of rows of `width` entries."""
    fake = tensor(node)
    if not isinstance(fake, FakeTensor):
        return False
    shapes = fake.fake_mode.shape_env
    with fake.fake_mode, torch.no_grad(), shapes.suppress_guards() if shapes is not None else nullcontext():
        whole = torch.empty((*fake.shape[:-1], width), dtype=fake.dtype, device=fake.device)
        part = whole[..., end - int(fake.shape[-1]) : end]
    values: dict[Node, Any] = {node: part}
    for user in graph.nodes:
        read = [n for n in user.all_input_nodes if n in values]
        if not read or not any(storages[user] & storages[n] for n in read):
            continue
        if is_getitem(user):
            values[user] = values[read[0]][user.args[1]]
            continue
        try:
            values[user] = run_again(user, fake.fake_mode, values)
        except (RuntimeError, ValueError):
            return False
    return True


def _upright(graph: Graph, product: Product, like: Node) -> Node:
    """A weight, its output features first."""
    return add_call(graph, torch.ops.aten.t.default, (product.weight,), like) if product.out else product.weight


def _join(
    graph: Graph, nodes: Sequence[Node], order: Order, made: dict[tuple[Any, ...], tuple[Node, Node | None]]
) -> None:
    """Let these layers compute in one product; what they read may be a part of another one by now.

    A layer that is called more than once has one part.

    made: the joint weights and biases so far, by the layers that they are made of
    """
    products = [product for node in nodes if (product := linear_product(node))]
    calls: dict[tuple[str, ...], list[Node]] = {}
    layers: list[Product] = []
    for node, product in zip(nodes, products, strict=True):
        key = _key(product)
        if key not in calls:
            layers.append(product)
        calls.setdefault(key, []).append(node)
    first = nodes[0]
    for layer in layers:
        for operand in _weights(layer):
            order.lift(operand, first)
    with graph.inserting_before(first):
        if tuple(calls) not in made:
            made[tuple(calls)] = _stack(graph, layers, first)
        for operand in filter(None, made[tuple(calls)]):
            order.lift(operand, first)
        joint = add_call(graph, torch.ops.aten.linear.default, (layers[0].x, *made[tuple(calls)]), first)
        parts = add_call(graph, split, (joint, [int(shape(same[0])[-1]) for same in calls.values()], -1), first)
        picked = [add_call(graph, operator.getitem, (parts, i), first) for i in range(len(calls))]
    for same, part in zip(calls.values(), picked, strict=True):
        for node in same:
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _key(product: Product) -> tuple[str, ...]:
    """The same for two layers with the same weight and bias, which may be computed by nodes of their own."""
    return (*map(_written, _weights(product)), str(product.out))


def _written(node: Node) -> str:
    if node.op != "call_function":
        return node.name
    return f"{node.target}{torch.fx.node.map_arg((node.args, node.kwargs), _written)}"


def _stack(graph: Graph, layers: Sequence[Product], like: Node) -> tuple[Node, Node | None]:
    """The weights of layers one below the other, and their biases if they have some: values that are kept."""
    weight = add_call(graph, cat, ([_upright(graph, layer, like) for layer in layers], 0), like)
    weight.meta[BAKED], weight.meta[JOINED] = True, tuple(layers)
    if layers[0].bias is None:
        return weight, None
    bias = add_call(graph, cat, ([layer.bias for layer in layers], 0), like)
    bias.meta[BAKED] = True
    return weight, bias
