"""Products by packed weights, whatever library packs them: which weights may be packed, and the change of a graph.

A packed weight is a kept value: the graph computes it by a call that packs, which the store takes out, and products
read it as their second operand, between x and the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from normfx.compat.operators import OpOverload
from normfx.graph.aliasing import escaping, storages_of
from normfx.graph.calls import add_call
from normfx.graph.nodes import BAKED, entries, parameter_only, shape, tensor
from normfx.graph.regions import is_autocast
from normfx.weights.kept import folded, records_gradients

T = TypeVar("T")

LEAST = {torch.float32: 2**16, torch.bfloat16: 2**15}
"""Entries of the smallest weights worth packing: the call itself costs 10 µs more than a plain product."""


class Packable(NamedTuple):
    """Says which weights may be packed: parameters and folds that do not leave the graph.

    known: what is computed from parameters alone. A product among these is part of a kept value, and is not packed
    """

    known: frozenset[Node]
    weights: frozenset[Node]
    storages: Mapping[Node, frozenset[Any]]
    outside: frozenset[Any]

    def __call__(self, weight: Node) -> bool:
        return weight in self.weights and not self.storages[weight] & self.outside


def is_packed_size(weight: Node) -> bool:
    """Whether a weight of a linear layer is worth packing."""
    size, least = entries(shape(weight)), LEAST.get(tensor(weight).dtype)
    return least is not None and size.is_Integer and bool(size >= least)


def packable_weights(graph: Graph, free: frozenset[Node]) -> Packable:
    known, storages = parameter_only(graph, free), storages_of(graph)
    weights = known & (free | folded(known))
    return Packable(known, weights, storages, frozenset(escaping(graph, storages)))


def claims_size(size: T, weight: Node, values: Mapping[Node, Tensor], known: MutableMapping[Tensor, T]) -> bool:
    """Whether a weight is packed for inputs of a size alone: for the first one that it meets, which is recorded, since
    each more would take more memory. Others take a form that serves all of them."""
    found, work = [], [weight]
    seen = {weight}
    while work:
        node = work.pop()
        if node in values:
            found.append(values[node])
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        work += new
    return bool(found) and known.setdefault(max(found, key=Tensor.numel), size) == size


class PackedProduct(NamedTuple):
    """The operands of a product by a packed weight.

    pack: the arguments of the call that packs the weight
    rest: the arguments of the product that follow its bias
    """

    x: Node
    pack: tuple[Any, ...]
    bias: Node | None
    rest: tuple[Any, ...]


def pack_products(
    gm: GraphModule,
    free: frozenset[Node],
    nodes: Iterable[Node],
    choose: Callable[[Node, Packable], PackedProduct | None],
    ops: tuple[OpOverload, OpOverload],
) -> None:
    """Replace the products of `nodes` that `choose` returns, in place; products that pack alike share the weight.

    free: parameters that may be kept
    ops:  the one that packs, and the product
    """
    graph = gm.graph
    nodes = list(nodes)
    if not nodes or is_autocast(graph) or records_gradients(graph):
        return
    packable = packable_weights(graph, free)
    packs: dict[str, Node] = {}
    for node in nodes:
        chosen = None if node in packable.known else choose(node, packable)
        if chosen is None:
            continue
        with graph.inserting_before(node):
            packed = packs.get(str(chosen.pack))
            if packed is None:
                packed = packs[str(chosen.pack)] = add_call(graph, ops[0], chosen.pack, node)
                packed.meta[BAKED] = True
            new = add_call(graph, ops[1], (chosen.x, packed, chosen.bias, *chosen.rest), node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def unpack_products(gm: GraphModule, packed: Node, plain: Callable[[Node], tuple[OpOverload, tuple[Any, ...]]]) -> None:
    """Replace the products by a packed weight by products with the weight itself, in place; other nodes stay.

    plain: the op and the arguments that compute what a product does
    """
    for product in list(packed.users):
        op, args = plain(product)
        with gm.graph.inserting_before(product):
            new = add_call(gm.graph, op, args, product)
        product.replace_all_uses_with(new)
        gm.graph.erase_node(product)
    gm.graph.erase_node(packed)
