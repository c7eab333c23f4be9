"""An expression on parameters: a small straight-line program, the same for every layer that has the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node


class Expression:
    """A deterministic function of tensors: what a fold computes. Equal programs are one object (see `expression`)."""

    def __init__(self, key: str, graph: Graph) -> None:
        self.key = key
        self._run = GraphModule({}, graph).forward

    def __call__(self, *sources: Tensor) -> Tensor:
        """Its value, a normal tensor without gradient, whatever modes the caller is in."""
        with torch.inference_mode(False), torch.no_grad(), _autocast_off(sources):
            result: Tensor = self._run(*sources)
        return result


def _autocast_off(sources: tuple[Tensor, ...]) -> torch.autocast:
    kind = sources[0].device.type if sources else "cpu"
    return torch.autocast(kind, enabled=False)


_KNOWN: WeakValueDictionary[str, Expression] = WeakValueDictionary()


def expression(node: Node, leaves: Mapping[Node, Any]) -> tuple[Expression, tuple[Node, ...]]:
    """The program that computes `node`, and the leaves it reads, in order."""
    names: dict[Node, str] = {}
    sources: list[Node] = []
    lines: list[str] = []
    order = _order(node, leaves)
    for item in order:
        if item in leaves:
            names[item] = f"a{len(sources)}"
            sources.append(item)
            continue
        names[item] = f"v{len(lines)}"
        args, kwargs = torch.fx.node.map_arg((item.args, item.kwargs), lambda n: _Name(names[n]))
        lines.append(f"{names[item]} = {item.target}{args!r}{dict(kwargs)!r}")
    key = f"({len(sources)}) " + "; ".join(lines)
    known = _KNOWN.get(key)
    if known is None:
        known = _KNOWN[key] = Expression(key, _graph(order, leaves, names))
    return known, tuple(sources)


class _Name(str):
    """A value's name inside a key, unlike any string argument."""

    def __repr__(self) -> str:
        return str(self)


def _order(node: Node, leaves: Mapping[Node, Any]) -> list[Node]:
    """The node, after what it needs; leaves included, not what leaves need. Without recursion: chains are long."""
    found: dict[Node, None] = {}
    work = [(node, False)]
    while work:
        item, ready = work.pop()
        if item in found:
            continue
        if ready or item in leaves:
            found[item] = None
            continue
        work.append((item, True))
        work += [(n, False) for n in reversed(item.all_input_nodes)]
    return list(found)


def _graph(order: list[Node], leaves: Mapping[Node, Any], names: Mapping[Node, str]) -> Graph:
    graph = Graph()
    copies: dict[Node, Node] = {item: graph.placeholder(names[item]) for item in order if item in leaves}
    for item in order:
        if item not in leaves:
            args, kwargs = torch.fx.node.map_arg((item.args, item.kwargs), copies.__getitem__)
            copies[item] = graph.create_node("call_function", item.target, args, kwargs)
    graph.output(copies[order[-1]])
    return graph
