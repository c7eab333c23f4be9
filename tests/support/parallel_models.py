"""A small pre-norm transformer, and the ways to spread it over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F

WIDTH, HEADS, TOKENS, VOCABULARY = 16, 4, 16, 20


class Block(nn.Module):
    """A pre-norm block; heads are counted by what the projections write, which may be a part of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width // HEADS
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        heads = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Model(nn.Module):
    """Embeddings, two blocks, a last norm and a head."""

    def __init__(self, blocks: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        torch.manual_seed(1)
        for parameter in self.parameters():  # means and outliers, and no γ of 1
            nn.init.normal_(parameter, 0.3 / width**0.5, 2 / width**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


COLUMNS = ("q", "k", "v", "up")
ROWS = ("o", "down")


def tensor_parallel(model: Model, mesh: Any) -> None:
    """Each process has some of the heads and hidden features; the stream is whole in each."""
    plan = {**{name: ColwiseParallel() for name in COLUMNS}, **{name: RowwiseParallel() for name in ROWS}}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def sequence_parallel(model: Model, mesh: Any) -> None:
    """Besides, each process has some of the tokens of the stream and of the norms."""
    tokens = Shard(1)
    inside: dict[str, Any] = {name: ColwiseParallel(input_layouts=tokens) for name in COLUMNS}
    inside |= {name: RowwiseParallel(output_layouts=tokens) for name in ROWS}
    inside |= {"ln1": SequenceParallel(), "ln2": SequenceParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, inside)
    outside = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "places": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=tokens, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, outside)


def split_columns(model: Model, mesh: Any) -> None:
    """The weights that write the stream are split along its features."""
    written = {name: ColwiseParallel(output_layouts=Replicate()) for name in ROWS}
    for block in model.blocks:
        parallelize_module(block, mesh, written)


class WholeStream(nn.Module):
    """A model whose stream is a DTensor itself, from its embedding to its head."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.mesh = mesh
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        distribute_module(self.double(), mesh)

    def forward(self, x: Tensor) -> Tensor:
        given = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        y = self.first(given)
        y = y + self.last(self.norm1(y))
        return self.norm2(y).redistribute(self.mesh, [Replicate()] * self.mesh.ndim).to_local()


class Collectives(nn.Module):
    """Tensor parallelism by hand: every process has its own weights, and sums are all-reduced."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.group = group
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + collectives.all_reduce(self.down(F.gelu(self.up(self.norm(x)))), "sum", self.group)
        return self.head(self.last(x))


class Stage(nn.Module):
    """Some of the blocks of a model, with its embeddings or its head at the ends."""

    def __init__(self, model: Model, rank: int, count: int) -> None:
        super().__init__()
        share = len(model.blocks) // count
        self.embed, self.places = (model.embed, model.places) if rank == 0 else (None, None)
        self.blocks = model.blocks[rank * share : (rank + 1) * share]
        self.norm, self.head = (model.norm, model.head) if rank == count - 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None and self.places is not None:
            x = self.embed(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))
