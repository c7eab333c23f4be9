"""A counterexample of pre_rms_norm that needs processes, if only one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Columns(nn.Module):
    """A writer whose weight is spread over processes along its output features; here one process has all of it."""

    def __init__(self) -> None:
        from torch.distributed.tensor import DTensor, Shard  # slow to import, and nothing else here needs it

        super().__init__()
        self.table, self.norm, self.mesh = nn.Embedding(10, 8), nn.LayerNorm(8), _alone()
        self.weight = nn.Parameter(DTensor.from_local(torch.randn(8, 8), self.mesh, [Shard(0)], run_check=False))

    def forward(self, ids: torch.Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Replicate

        x = self.table(ids)
        given = DTensor.from_local(torch.tanh(x), self.mesh, [Replicate()], run_check=False)
        written: Any = nn.functional.linear(given, self.weight)
        return self.norm(x + written.redistribute(placements=[Replicate()]).to_local())


def _alone() -> Any:
    """A mesh of this process, in a group of its own where there is none yet."""
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return init_device_mesh("cpu", (dist.get_world_size(),))
