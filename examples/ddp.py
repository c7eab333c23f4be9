"""Distributed data parallel with normfx, on CPUs: `torchrun --standalone --nproc-per-node 2 examples/ddp.py`."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import normfx


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks and a head; a class, not an nn.Sequential.

    The wrapper's hooks break the graph, so torch.compile starts a graph at the forward of the wrapped module; but it
    starts none in code of torch.nn: of a bare nn.Sequential it would compile each block alone.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(20, width), nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gradients(compiled: bool) -> dict[str, Tensor]:
    """Returns the gradients of this process's own rows, averaged over all processes by DDP."""
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Model())
    step = torch.compile(wrapped, backend="normfx") if compiled else wrapped
    ids = torch.randint(0, 20, (32, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    nn.functional.cross_entropy(step(ids).flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}


def main() -> None:
    dist.init_process_group("gloo")
    eager, compiled = gradients(compiled=False), gradients(compiled=True)
    difference = torch.stack([(eager[name] - compiled[name]).abs().max() for name in eager]).max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    counts = normfx.compiled_report().counts
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {len(compiled)} of {len(eager)} gradients")
        print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms")
        print(f"largest difference of the gradients from eager DDP: {difference.item():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
