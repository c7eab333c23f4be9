"""What ops of ATen write that their schemas do not say."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import Node

_IN_TRAINING = frozenset(
    {
        "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
        "_batch_norm_impl_index",
    }
)  # fmt: skip
_ALWAYS = frozenset({"batch_norm_update_stats", "batch_norm_gather_stats", "batch_norm_gather_stats_with_counts"})

WRITES_STATISTICS = _IN_TRAINING | _ALWAYS
"""Ops that update running statistics: those of `_IN_TRAINING` if they normalise by the statistics of their input."""

_FLAGS = ("training", "use_input_stats")


def unannotated_writes(node: Node) -> list[Node]:
    """The values that a call writes although its schema does not say so: the running statistics of a norm in training.

    A flag that is not a plain False counts as True.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return []
    name = target._schema.name.split("::")[1]
    if name not in WRITES_STATISTICS:
        return []
    given = {**dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)), **node.kwargs}
    if name in _IN_TRAINING and all(given.get(flag, False) is False for flag in _FLAGS):
        return []
    return [n for n in (given.get("running_mean"), given.get("running_var")) if isinstance(n, Node)]
