"""What recognition must know of a graph as a whole, found once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from normfx.graph.aliasing import mutated
from normfx.graph.nodes import grad_modes, parameter_only
from normfx.graph.order import Order


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts about one graph, which hold until it is edited.

    weights:    placeholders and attributes that are parameters, buffers or constants
    written:    values whose memory is written in place; nothing is assumed of them
    parameters: values of the weights alone, by deterministic pure ops
    live:       of these, the ones whose folds are computed in every call, at a price
    composed_live: of these, the ones that must be computed in every call, whatever it costs
    modes:      whether gradients are recorded at each node
    order:      says what may be computed earlier
    adds_apart: a bias that a product did not have is added in passes of its own, in every product
    """

    graph: Graph
    weights: frozenset[Node]
    written: frozenset[Node]
    parameters: frozenset[Node]
    live: frozenset[Node]
    composed_live: frozenset[Node]
    modes: Mapping[Node, bool]
    order: Order
    adds_apart: bool = False


def facts_of(
    graph: Graph, weights: frozenset[Node], live: frozenset[Node] | None = frozenset(), adds_apart: bool = False
) -> Facts:
    """The facts about a graph.

    live: those of the weights whose folds are computed in every call, at a price; None: all, whatever the price
    """
    written = mutated(graph)
    parameters = parameter_only(graph, weights, written)
    priced = frozenset(_dependents(parameters, live or ()))
    always = weights if live is None else priced
    order = Order(graph, written)
    return Facts(graph, weights, written, parameters, priced, always, grad_modes(graph), order, adds_apart)


def _dependents(parameters: frozenset[Node], start: Iterable[Node]) -> Iterator[Node]:
    """These parameters and everything that is computed from them and other parameters alone."""
    seen: set[Node] = set()
    work = [node for node in start if node in parameters]
    while work:
        node = work.pop()
        if node not in seen:
            seen.add(node)
            yield node
            work += [user for user in node.users if user in parameters]
