"""What ops of ATen write that their schemas do not say."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import Node

WRITES_STATISTICS = frozenset(
    {"batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
    | {"_batch_norm_impl_index"}
)
"""Ops that update running statistics if they normalise by those of their input."""

_FLAGS = ("training", "use_input_stats")


def unannotated_writes(node: Node) -> list[Node]:
    """The values that a call writes although its schema does not say so: the running statistics of a norm in training.

    A flag that is not a plain False counts as True.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.name.split("::")[1] not in WRITES_STATISTICS:
        return []
    names = (argument.name for argument in target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if all(given.get(flag, False) is False for flag in _FLAGS):
        return []
    return [n for n in (given.get("running_mean"), given.get("running_var")) if isinstance(n, Node)]
