"""DTensors, of which each process holds a part, and what processes know of each other. Tried on torch 2.13 and 2.14."""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

import torch

if torch.distributed.is_available():
    from torch.distributed import distributed_c10d

local_of = attrgetter("_local_tensor")
"""The part of a DTensor that this process holds."""


def is_distributed(value: object) -> bool:
    """Whether a value is a DTensor. There is none as long as torch's module of them has not been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(value) is module.DTensor


def placements_of(value: Any) -> tuple[Any, ...] | None:
    """For each dimension of the mesh, how a DTensor is laid out over it; None where one of them is of a kind that is
    not known: only whole copies, parts along one dimension, and terms of a sum or an average are."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    for placement in value.placements:
        if type(placement) is Partial and placement.reduce_op not in ("sum", "avg"):
            return None
        if type(placement) not in (Partial, Replicate, Shard):
            return None
    return tuple(value.placements)


def refaked(value: Any, fake: Any) -> Any:
    """A DTensor of the same layout, on what `fake` makes of its part."""
    names, context = value.__tensor_flatten__()
    inner = {name: fake(getattr(value, name)) for name in names}
    with torch.no_grad():
        return type(value).__tensor_unflatten__(inner, context, value.size(), value.stride())


def ranks_of(mesh: Any) -> frozenset[int]:
    """The processes of a mesh."""
    return frozenset(int(rank) for rank in mesh.mesh.flatten().tolist())


def ranks_of_group(name: Any) -> frozenset[int]:
    """The processes of a group that an operator names."""
    group = distributed_c10d._resolve_process_group(name)
    return frozenset(torch.distributed.get_process_group_ranks(group))


def everyone() -> frozenset[int]:
    """All processes."""
    return frozenset(range(torch.distributed.get_world_size()))


def is_even(value: Any) -> bool:
    """Whether all processes hold parts of the same size of a DTensor."""
    shape, sizes = list(value.shape), value.device_mesh.shape
    for placement, size in zip(value.placements, sizes, strict=True):
        for dim, length in enumerate(shape):
            if placement.is_shard(dim):
                if not isinstance(length, int) or length % size:
                    return False
                shape[dim] = length // size
    return True


def shared_store(prefix: str) -> Any:
    """The store by which the processes of the default group found each other, for keys with a prefix."""
    return torch.distributed.PrefixStore(prefix, distributed_c10d._get_default_store())
