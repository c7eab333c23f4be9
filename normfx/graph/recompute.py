"""Which nodes of a graph are computed a second time in backward: the marks that torch.utils.checkpoint leaves.

Under torch.compile a checkpointed region is no more than two entries in the meta of its nodes, which AOTAutograd hands
on to whatever it traces from them: what its partitioner shall do with the value, and the region's number. Where a value
of one region is read in a region with a larger number, the partitioner keeps it: it is the second one's input. So tried
on torch 2.11 (`TagActivationCheckpoint.tag_nodes`), 2.13 and 2.15 (`_CachingTorchDispatchMode`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from normfx.graph.nodes import parameter_only
from normfx.ir import ops

POLICY, REGION = MARKS = ("recompute", "ac_graph_id")
"""Meta keys: what becomes of the value, and the number of the checkpointed region."""

FIRST_REGION = 1 << 32
"""Regions that torch numbers itself count from 1, in the same graph: ours follow them."""


def mark(node: Node, region: int) -> None:
    """The node is part of a checkpointed region."""
    node.meta[POLICY], node.meta[REGION] = CheckpointPolicy.PREFER_RECOMPUTE, region


def region_of(node: Node) -> int | None:
    """The number of the checkpointed region a node is part of."""
    number: int | None = node.meta.get(REGION)
    return number


def inherit(node: Node, like: Node) -> None:
    """The node is part of the checkpointed region that `like` is part of, if it is."""
    if REGION in like.meta:
        node.meta.update({key: like.meta[key] for key in MARKS if key in like.meta})


def keep(node: Node) -> None:
    """The value is kept for backward, if backward reads it, and not computed again."""
    node.meta.pop(REGION, None)
    node.meta[POLICY] = CheckpointPolicy.MUST_SAVE


def keep_folds(graph: Graph, weights: Iterable[Node]) -> None:
    """Folded weights of linears inside checkpointed regions are computed once, in forward.

    The partitioner may find it cheaper to compute them again: kept, they cost the bytes of the weights they stand for.
    """
    known = parameter_only(graph, weights)
    for node in graph.nodes:
        if node.target in ops.FOLDS and node in known and POLICY in node.meta:
            keep(node)


def digest(graph: Graph) -> str:
    """A digest of the marks of a graph, which AOTAutograd's cache does not look at; "" where there are none."""
    found = [f"{n.name} {n.meta[POLICY]} {n.meta.get(REGION)}" for n in graph.nodes if n.meta.get(POLICY) is not None]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] if found else ""
