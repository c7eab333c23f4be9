"""Canonical subgraphs → sites: norms, linears, residual streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch.fx import Graph, Node

from normfx.ir.graph import grad_modes, parameter_only
from normfx.ir.order import Order
from normfx.ir.sites import Sites
from normfx.recognize.batch import find_batch_norms
from normfx.recognize.composed import find_composed
from normfx.recognize.norms import find_norms
from normfx.recognize.readers import find_all_readers, find_scaled
from normfx.recognize.residual import find_residuals
from normfx.recognize.stream import find_streams


def recognize(
    graph: Graph,
    weights: frozenset[Node],
    mutated: frozenset[Node],
    name: Callable[[Node], str],
    source: Callable[[Node], str],
    live: frozenset[Node] | None = frozenset(),
) -> Sites:
    """All sites of a canonical graph.

    weights: placeholders and attributes that are parameters, buffers or constants
    mutated: values whose memory is written in place; nothing is assumed of them
    name, source: module path and source line of a node ("" when unknown)
    live:    those of the weights whose folds are computed in every call, at a price; None: all, whatever the price
    """
    parameters = parameter_only(graph, weights, mutated)
    norms = find_norms(graph, parameters, name, source, mutated)
    modes, order = grad_modes(graph), Order(graph, mutated)
    scaled = [found for norm in norms if (found := find_scaled(norm, modes)) is not None and found.node not in mutated]
    priced = frozenset(_dependents(parameters, live or ()))
    return Sites(
        norms=norms,
        streams=find_streams(graph, norms, parameters, mutated, modes, order, priced),
        readers=find_all_readers([n for n in norms if n.kind != "BatchNorm"], parameters, mutated, modes, priced),
        scaled={found.norm: found for found in scaled},
        residuals=tuple(find_residuals(norms, scaled, parameters, mutated, modes, order)),
        batch_norms=tuple(find_batch_norms(graph, norms, parameters, mutated, modes, order, priced)),
        composed=tuple(find_composed(graph, parameters, weights if live is None else priced)),
    )


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
