"""Values that several processes hold together (DTensors), and the calls by which tensors become such and back.

A DTensor stands for its whole: ops on it mean what they mean for the whole tensor, whichever part a process computes.
So what is proved of plain tensors holds for it, with two additions: features that are spread over processes have no
mean in any of them, and a process' own part (`to_local`) says something of rows only where it has whole rows.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from normfx.compat.distributed import is_distributed, local_of, placements_of
from normfx.graph.opaque import CARRIED, only_wraps

CROSSINGS = ("from_local", "to_local", "redistribute")


def crossing(node: Node) -> str:
    """The name of the call by which a node makes a DTensor of a process' part, takes the part out, or lays a DTensor
    out in another way; "" for any other node."""
    if not node.args or not isinstance(node.args[0], Node):
        return ""
    if node.op == "call_method" and CARRIED in node.meta:
        known = is_distributed(node.args[0].meta.get("val"))
        return str(node.target) if known and node.target in CROSSINGS[1:] else ""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name if name == CROSSINGS[0] and only_wraps(node) and is_distributed(node.meta.get("val")) else ""


def has_whole_rows(value: object, dim: int) -> bool:
    """Whether each process holds whole rows along a dimension, or terms of a sum of such: no DTensor, or one whose
    layout is known and leaves the dimension whole."""
    if not is_distributed(value):
        return True
    placements = placements_of(value)
    return placements is not None and not any(placement.is_shard(dim) for placement in placements)


def is_split(value: object, dim: int) -> bool:
    """Whether a dimension of a DTensor is spread over processes."""
    return is_distributed(value) and any(placement.is_shard(dim) for placement in getattr(value, "placements", ()))


def is_summed(value: object) -> bool:
    """Whether a DTensor is, or may be, the sum of what the processes hold."""
    if not is_distributed(value):
        return False
    placements = placements_of(value)
    return placements is None or any(placement.is_partial() for placement in placements)


def own_part(value: Any) -> Any:
    """What this process holds of a DTensor; any other value as it is."""
    return local_of(value) if is_distributed(value) else value
