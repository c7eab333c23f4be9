"""Borders that no norm is matched across and no value moved across: autocast, grad and inference mode."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch.fx import Graph, Node

from normfx.graph.regions import is_mode_switch, modes_along, target_name


def regions(graph: Graph) -> Mapping[Node, Hashable]:
    """The region of each node: nodes of equal regions run under the same grad, autocast and inference mode.

    The grad mode around the graph is unknown: what the first switch sets is taken to differ from it. If
    that is wrong, equal regions merely look different.
    """
    switches = [node for node in graph.nodes if is_mode_switch(node)]
    first = next((not n.args[0] for n in switches if target_name(n) == "_set_grad_enabled"), None)
    return {node: (grad, entered) for node, grad, entered in modes_along(graph, first)}
