"""Finds live folds: expressions on the parameters that stay in the graph and are computed where they are used.

Live folds cannot go stale: whatever writes a parameter, the next call reads it. They give the original parameters'
gradients (maths M14) and leave the state dict, optimisers and checkpoints untouched.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from normfx.graph.nodes import op_name, parameter_only
from normfx.ir import ops


def live_folds(graph: Graph, weights: Iterable[Node]) -> tuple[Node, ...]:
    """The nodes of a rewritten graph that compute folded weights from parameters alone.

    The centred rows of an embedding count too: they are rows of the centred table.
    """
    known = parameter_only(graph, weights)
    folds = (node for node in graph.nodes if node.target in ops.FOLDS)
    return tuple(node for node in folds if node in known or _is_embedding(node.args[0]))


def _is_embedding(node: object) -> bool:
    return isinstance(node, Node) and op_name(node) == "aten::embedding"
