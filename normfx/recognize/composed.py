"""Weights that a graph computes from parameters alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from normfx.graph.aliasing import escaping, read_outside, storages_of
from normfx.graph.facts import Facts
from normfx.graph.nodes import op_name
from normfx.graph.packing import packed_sources
from normfx.graph.regions import is_autocast
from normfx.ir.sites import Composed

AUTOCAST_NEUTRAL = frozenset(
    {"add", "clone", "contiguous", "detach", "div", "expand", "mul", "neg", "permute", "reshape", "select", "slice",
     "squeeze", "sub", "t", "to", "transpose", "unsqueeze", "view"}
)  # fmt: skip
"""ATen ops that do the same under autocast and without."""


def find_composed(facts: Facts) -> Iterator[Composed]:
    """The values of parameters alone that something else reads, views left aside."""
    graph = facts.graph
    storages = storages_of(graph)
    outside = escaping(graph, storages)
    autocast = is_autocast(graph)
    for node in read_outside(graph, facts.parameters, storages):
        if node.op != "call_function":
            continue
        nodes = tuple(_behind(node, storages))
        sources = tuple(
            n for n in dict.fromkeys(s for m in nodes for s in m.all_input_nodes) if n.op != "call_function"
        )
        obstacle = "leaves" if storages[node] & outside else "packed_weight" if packed_sources(node) else ""
        if autocast and not all(is_autocast_neutral(n) for n in nodes):
            obstacle = obstacle or "autocast"
        yield Composed(node, nodes, tuple(n for n in sources if n in facts.composed_live), obstacle)


def is_autocast_neutral(node: Node) -> bool:
    return op_name(node).removeprefix("aten::").split(".")[0] in AUTOCAST_NEUTRAL


def _behind(node: Node, storages: dict[Node, frozenset[int]]) -> Iterator[Node]:
    """The node and the computing nodes it is made of."""
    seen: set[Node] = set()
    work = [node]
    while work:
        item = work.pop()
        if item in seen or item.op != "call_function":
            continue
        seen.add(item)
        views = any(storages[item] & storages[n] for n in item.all_input_nodes)
        if isinstance(item.meta.get("val"), torch.Tensor) and not views:
            yield item
        work += item.all_input_nodes
