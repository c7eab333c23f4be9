"""Canonical subgraphs → sites: norms, linears, residual streams."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, Node

from normfx.ir.graph import grad_modes, parameter_only
from normfx.ir.sites import Sites
from normfx.recognize.norms import find_norms
from normfx.recognize.readers import find_all_readers, find_scaled
from normfx.recognize.stream import find_streams


def recognize(
    graph: Graph,
    weights: frozenset[Node],
    mutated: frozenset[Node],
    name: Callable[[Node], str],
    source: Callable[[Node], str],
) -> Sites:
    """All sites of a canonical graph.

    weights: placeholders and attributes that are parameters, buffers or constants
    mutated: values whose memory is written in place; nothing is assumed of them
    name, source: module path and source line of a node ("" when unknown)
    """
    parameters = parameter_only(graph, weights - mutated) - mutated
    norms = find_norms(graph, parameters, name, source, mutated)
    modes = grad_modes(graph)
    scaled = [found for norm in norms if (found := find_scaled(norm, modes)) is not None and found.node not in mutated]
    return Sites(
        norms=norms,
        streams=find_streams(graph, norms, parameters, mutated, modes),
        readers=find_all_readers(norms, parameters, mutated, modes),
        scaled={found.norm: found for found in scaled},
    )
