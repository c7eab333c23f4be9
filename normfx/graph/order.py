"""Where in a graph a value may be computed, and moving what computes it there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property

from torch.fx import Graph, Node

from normfx.errors import NormfxError
from normfx.graph.aliasing import mutated
from normfx.graph.barriers import regions
from normfx.graph.nodes import is_pure
from normfx.graph.regions import carried


class Order:
    """The order of a graph's nodes, and what must not be crossed.

    A value may move up to a node if the same numbers are computed there, with the same gradients: by pure ops, from
    memory that is not written after it was made, in the same grad, autocast and inference mode.
    """

    def __init__(self, graph: Graph, written: frozenset[Node] | None = None) -> None:
        """written: values whose memory is written in place after they were made (found when needed if not given)"""
        self.graph = graph
        self._known = written

    def can_lift(self, value: Node, place: Node) -> bool:
        """Whether a value stands before a node, or may be computed there."""
        return all(self._movable(node, place) for node in _late(value, place))

    def lift(self, value: Node, place: Node) -> None:
        """Move a value, and what it is computed from, before a node, as far as they stand after it."""
        late = _late(value, place)
        stuck = [node.name for node in late if not self._movable(node, place)]
        if stuck:
            raise NormfxError(f"normfx: {place.name} needs {value.name}, and {', '.join(stuck)} cannot move before it")
        for node in sorted(late):
            place.prepend(node)

    def _movable(self, node: Node, place: Node) -> bool:
        if node is place or not (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
            return False
        if node in self._carried or self._written.intersection((node, *node.all_input_nodes)):
            return False
        return self._region(node) == self._region(place)

    def _region(self, node: Node) -> Hashable:
        """The position of a new node is that of the node it was inserted after."""
        while node not in self._regions and node.prev.op != "root":
            node = node.prev
        return self._regions.get(node)

    @cached_property
    def _regions(self) -> Mapping[Node, Hashable]:
        return regions(self.graph)

    @cached_property
    def _written(self) -> frozenset[Node]:
        return mutated(self.graph) if self._known is None else self._known

    @cached_property
    def _carried(self) -> set[Node]:
        return carried(self.graph)


def _late(value: Node, place: Node) -> list[Node]:
    """What computes a value, itself included, as far as it does not stand before a node."""
    found: dict[Node, None] = {}
    work = [value]
    while work:
        node = work.pop()
        if node not in found and not node < place:
            found[node] = None
            work += node.all_input_nodes
    return list(found)
