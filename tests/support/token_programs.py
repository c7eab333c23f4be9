"""More steps of random programs: rows picked, written and added by index, experts, gates, windows, norms in odd places.

Each step is a function of a `Step`; its parameters are declared next to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, TOKENS, WIDTH, EXPERTS = 2, 4, 8, 3


@dataclass(frozen=True)
class At:
    """Where a step stands: its value, the first and the last values, token numbers, its parameters."""

    x: Tensor
    first: Tensor
    last: list[Tensor]
    ids: Tensor
    part: Any
    vector: Any

    @property
    def rows(self) -> Tensor:
        """A token for each token, (BATCH, TOKENS)."""
        return self.ids % TOKENS

    @property
    def wide(self) -> Tensor:
        """The same, expanded to the features."""
        return self.rows[..., None].expand(-1, -1, WIDTH)

    @property
    def flag(self) -> Tensor:
        """A truth value for each token."""
        return self.ids > 5


@dataclass(frozen=True)
class Form:
    run: Callable[[At], Tensor]
    parts: Callable[[], nn.Module] | None = None
    shape: tuple[int, ...] | None = None


def _square() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _norms(count: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList([*(nn.LayerNorm(WIDTH) for _ in range(count)), nn.Linear(WIDTH, WIDTH)])


class Experts(nn.Module):
    """A norm, a router and stacked weights of small feed-forward networks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = (nn.Parameter(torch.empty(EXPERTS, a, b)) for a, b in ((WIDTH, 5), (5, WIDTH)))
        self.bias = nn.Parameter(torch.empty(EXPERTS, 1, 5))


def _moe_einsum(at: At) -> Tensor:
    y = at.part.norm(at.x)
    gates = at.part.router(y).softmax(-1)
    hidden = torch.relu(torch.einsum("btd,edh->bteh", y, at.part.up))
    return at.x + torch.einsum("bteh,ehd,bte->btd", hidden, at.part.down, gates)


def _moe_stacked(at: At) -> Tensor:
    y = at.part.norm(at.x)
    gates = at.part.router(y).softmax(-1)
    rows = y.reshape(1, -1, WIDTH).expand(EXPERTS, -1, -1)
    hidden = torch.relu(torch.baddbmm(at.part.bias, rows, at.part.up))
    written = torch.bmm(hidden, at.part.down).view(EXPERTS, *at.x.shape)
    return at.x + (written * gates.permute(2, 0, 1).unsqueeze(-1)).sum(0)


def _moe_loop(at: At) -> Tensor:
    """Each expert takes the tokens that want it most (a fixed number), and adds to a sum that starts as zeros."""
    y = at.part.norm(at.x).view(-1, WIDTH)
    gates = at.part.router(y).softmax(-1)
    out = torch.zeros_like(y)
    for e in range(EXPERTS):
        gate, chosen = (gates[:, e] + 0.01 * torch.arange(BATCH * TOKENS)).topk(3)  # equal tokens are no ties
        written = F.relu(y[chosen] @ at.part.up[e]) @ at.part.down[e]
        out.index_add_(0, chosen, written * gate[:, None])
    return at.x + out.view_as(at.x)


def _prune(at: At) -> Tensor:
    """Three tokens of four are kept, changed and put back among the others."""
    kept = at.ids.double().topk(3, 1).indices[..., None].expand(-1, -1, WIDTH)
    pruned = at.x.gather(1, kept)
    return at.x.scatter(1, kept, pruned + at.part(torch.sin(at.first[:, :3])))


def _merge(at: At) -> Tensor:
    """Tokens are averaged into others (token merging), and spread again."""
    merged = at.x[:, ::2].scatter_reduce(1, at.wide[:, :2] % 2, at.x[:, 1::2], reduce="mean")
    return merged.repeat_interleave(2, 1)


def _windows(at: At) -> Tensor:
    shifted = at.x.roll(-1, 1).view(BATCH, 2, 2, WIDTH).transpose(1, 2).reshape(-1, 2, WIDTH)
    back = (shifted + at.part(torch.sin(torch.ones_like(shifted)))).view(BATCH, 2, 2, WIDTH).transpose(1, 2)
    return back.reshape(BATCH, TOKENS, WIDTH).roll(1, 1)


def _drop_path(at: At) -> Tensor:
    keep = (0.5 + torch.rand(BATCH, 1, 1, dtype=at.x.dtype)).floor()
    return at.x + at.part(torch.sin(at.first)) / 0.5 * keep


def _drop_path_in_place(at: At) -> Tensor:
    keep = at.x.new_empty((BATCH, 1, 1)).bernoulli_(0.5)
    keep.div_(0.5)
    return at.x * keep + at.first


def _assign(at: At) -> Tensor:
    y = at.x * 1.0
    y[:, torch.tensor([1, 3])] = at.part(torch.sin(at.first[:, :2]))
    y[at.flag] = 0.0
    return y


def _accumulate(at: At) -> Tensor:
    rows, columns = torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2])
    return at.x.index_put((rows, columns), at.first[rows, columns], accumulate=True)


def _resample(at: At) -> Tensor:
    fine = F.interpolate(at.x.transpose(1, 2), scale_factor=2, mode="linear")
    return F.avg_pool1d(fine, 2).transpose(1, 2)


def _depth(at: At) -> Tensor:
    """A learned average over depth (DenseFormer)."""
    return sum((at.vector[i] * value for i, value in enumerate(at.last)), start=at.x)


def _features_permuted(at: At) -> Tensor:
    """Each feature takes its token from elsewhere."""
    return (at.rows[..., None] + torch.arange(WIDTH)) % TOKENS


TOKEN_OPS: dict[str, Form] = {
    "expanded_gate": Form(lambda at: at.x * at.vector.sigmoid().expand(TOKENS, WIDTH), shape=(TOKENS, 1)),
    "repeated_gate": Form(lambda at: at.x * (at.vector.repeat(1, WIDTH) + 1.0), shape=(TOKENS, 1)),
    "expanded_term": Form(lambda at: at.x + at.vector.expand_as(at.x).cos(), shape=(TOKENS, 1)),
    "expanded_mask": Form(lambda at: at.x.masked_fill(at.flag.unsqueeze(-1).expand_as(at.x), 0.0)),
    "expanded_choice": Form(lambda at: torch.where((at.wide > 1) & (at.wide < 3), at.x, at.first)),
    "gather_rows": Form(lambda at: at.x.gather(1, at.wide)),
    "take_rows": Form(lambda at: torch.take_along_dim(at.x, at.rows[..., None], 1)),
    "prune": Form(_prune, _square),
    "merge": Form(_merge),
    "scatter_rows": Form(lambda at: at.x.scatter(1, at.wide[:, :1], at.first[:, :1])),
    "scatter_zeros": Form(lambda at: at.x.scatter(1, at.wide[:, :2], 0.0)),
    "scatter_sum": Form(lambda at: torch.zeros_like(at.x).scatter_add_(1, at.wide, at.x) + at.x),
    "scatter_alone": Form(lambda at: at.x.scatter_reduce(1, at.wide, at.first, "sum", include_self=False)),
    "index_add": Form(
        lambda at: at.x.index_add(1, torch.tensor([0, 2]), at.part(torch.sin(at.first[:, :2])), alpha=0.5), _square
    ),
    "index_copy": Form(lambda at: at.x.index_copy(1, torch.tensor([3]), at.first[:, :1])),
    "index_zeros": Form(lambda at: at.x.index_fill(1, torch.tensor([1]), 0.0)),
    "assign": Form(_assign, _square),
    "accumulate": Form(_accumulate),
    "masked_scatter": Form(
        lambda at: at.x.masked_scatter(at.flag[..., None].expand_as(at.x), at.part(at.first.sin())), _square
    ),
    "select_scatter": Form(lambda at: at.x.select_scatter(at.first[:, 1], 1, 2)),
    "slice_scatter": Form(lambda at: at.x.slice_scatter(at.first[:, 1:3], 1, 0, 4, 2)),
    "diff": Form(lambda at: torch.diff(at.x, dim=1, prepend=at.first[:, :1])),
    "lerp": Form(lambda at: torch.lerp(at.x, at.first, 0.3)),
    "lerp_token": Form(lambda at: torch.lerp(at.x, at.first, at.vector), shape=(TOKENS, 1)),
    "addcmul": Form(lambda at: torch.addcmul(at.x, at.vector, at.first, value=0.5), shape=(TOKENS, 1)),
    "addcdiv": Form(lambda at: torch.addcdiv(at.x, at.first, at.vector.abs() + 1.0), shape=(TOKENS, 1)),
    "baddbmm": Form(
        lambda at: torch.baddbmm(at.x, at.vector.expand(BATCH, -1, -1), at.first, alpha=0.5), shape=(TOKENS, TOKENS)
    ),
    "mix_einsum": Form(lambda at: at.x + torch.einsum("st,b...td->b...sd", at.vector, at.x), shape=(TOKENS, TOKENS)),
    "token_dot": Form(
        lambda at: at.x + (torch.matmul(at.vector, at.x) + torch.matmul(at.first.mT, at.vector))[:, None],
        shape=(TOKENS,),
    ),
    "batch_sum": Form(
        lambda at: at.x + torch.addbmm(at.first[0], at.vector.expand(BATCH, -1, -1), at.x), shape=(TOKENS, TOKENS)
    ),
    "depth": Form(_depth, shape=(3,)),
    "depth_dot": Form(
        lambda at: torch.tensordot(at.vector, torch.stack([at.x, at.first]), 1).addcmul(at.x, at.vector[0]),
        shape=(2,),
    ),
    "rezero": Form(lambda at: at.x + at.vector * at.part(torch.sin(at.first)), _square, ()),
    "zeros_start": Form(lambda at: torch.zeros_like(at.x) + at.x + at.part(torch.sin(at.first)), _square),
    "drop_path": Form(_drop_path, _square),
    "drop_path_in_place": Form(_drop_path_in_place),
    "early_exit": Form(
        lambda at: torch.where(at.flag.unsqueeze(-1), at.x, at.x + at.part(torch.sin(at.first))), _square
    ),
    "windows": Form(_windows, _square),
    "resample": Form(_resample),
    "neighbours": Form(lambda at: at.x + F.pad(at.x, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)),
    "prompt": Form(
        lambda at: torch.cat([at.x[:, :2], at.vector.expand(BATCH, -1, -1)], 1), shape=(1, 2, WIDTH)
    ),
    "moe_einsum": Form(_moe_einsum, Experts),
    "moe_stacked": Form(_moe_stacked, Experts),
    "moe_loop": Form(_moe_loop, Experts),
    "sandwich": Form(
        lambda at: at.x + at.part[1](at.part[2](torch.relu(at.part[0](at.x)))) * 1.0, _norms(2)
    ),
}  # fmt: skip
"""A centred stream passes these, or they write to it."""

TOKEN_TRAPS: dict[str, Form] = {
    "gather_features": Form(lambda at: at.x.gather(1, _features_permuted(at))),
    "scatter_features": Form(lambda at: at.x.scatter_add(1, _features_permuted(at), at.first)),
    "gather_along": Form(lambda at: at.x.gather(2, at.wide)),
    "scatter_part": Form(lambda at: at.x.scatter(1, at.wide[:, :1, :3], 0.0)),
    "fill_one": Form(lambda at: at.x.index_fill(1, torch.tensor([1]), 1.0)),
    "scatter_one": Form(lambda at: at.x.scatter(1, at.wide[:, :2], 1.0)),
    "scatter_max": Form(lambda at: at.x.scatter_reduce(1, at.wide, at.first, "amax")),
    "lerp_channel": Form(lambda at: torch.lerp(at.x, at.first, at.vector), shape=(WIDTH,)),
    "gate_channel": Form(lambda at: at.x * at.vector.expand_as(at.x).sigmoid(), shape=(WIDTH,)),
    "gate_written": Form(lambda at: at.x * torch.ones_like(at.x).mul_(at.vector), shape=(WIDTH,)),
    "mask_channel": Form(lambda at: at.x.masked_fill((torch.arange(WIDTH) > 5).expand_as(at.x), 0.0)),
    "einsum_channel": Form(lambda at: torch.einsum("btd,d->btd", at.x, at.vector), shape=(WIDTH,)),
    "masked_scatter_channel": Form(
        lambda at: at.x.masked_scatter((torch.arange(WIDTH) > 5).expand_as(at.x), at.first)
    ),
    "deep_norm": Form(lambda at: at.part[0](at.x * 1.5 + at.part[1](torch.sin(at.first))), _norms()),
    "merged_patches": Form(
        lambda at: at.part[1](at.part[0](torch.cat([at.x[:, ::2], at.x[:, 1::2]], -1))).repeat_interleave(2, 1),
        lambda: nn.ModuleList([nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)]),
    ),
    "token_norm": Form(
        lambda at: at.x + at.part(at.x.transpose(1, 2)).transpose(1, 2), lambda: nn.LayerNorm(TOKENS)
    ),
    "plane_norm": Form(
        lambda at: at.x + 0.5 * at.part(at.x), lambda: nn.LayerNorm((TOKENS, WIDTH))
    ),
    "plane_rms_norm": Form(lambda at: at.x - F.rms_norm(at.x, (TOKENS, WIDTH)) / 3.0),
    "plane_without_affine": Form(lambda at: at.x - F.layer_norm(at.x, (TOKENS, WIDTH)) * 2.0),
    "shuffle": Form(lambda at: at.x.view(BATCH, TOKENS, 2, 4).transpose(2, 3).flatten(2) * at.vector, shape=(WIDTH,)),
    "product": Form(lambda at: torch.addcmul(at.x, at.x, at.first)),
    "max": Form(lambda at: torch.maximum(at.x, at.first)),
}  # fmt: skip
"""They look alike, and do not commute with the mean over the features, or have a norm in an odd place."""

TOKEN_OBSERVERS: dict[str, Form] = {
    "raw_adapter": Form(lambda at: at.part(at.x), lambda: nn.Linear(WIDTH, 3)),
    "raw_gather": Form(lambda at: at.x.gather(1, at.wide)),
    "read_rows": Form(lambda at: at.part[1](at.part[0](at.x).gather(1, at.wide)), _norms()),
    "read_stack": Form(
        lambda at: torch.matmul(at.part.norm(at.x)[:, None], at.part.up), Experts
    ),
    "read_router": Form(lambda at: at.part.router(at.part.norm(at.x)[:, at.rows[0]]), Experts),
    "read_padded": Form(lambda at: at.part[1](F.pad(at.part[0](at.x), (0, 0, 1, 1))), _norms()),
    "read_zeroed": Form(lambda at: at.part[1](at.part[0](at.x).masked_fill(at.flag[..., None], 0.0)), _norms()),
    "read_written": Form(
        lambda at: at.part[1](torch.zeros_like(at.x).index_add_(1, at.rows[0], at.part[0](at.x))), _norms()
    ),
}  # fmt: skip
"""Readers of the stream or of a norm on it, as outputs of the program."""

FORMS = TOKEN_OPS | TOKEN_TRAPS | TOKEN_OBSERVERS
