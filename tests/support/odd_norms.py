"""Random small models of one or two norms in every form that users write, each next to something that a rule looks for.

Norms of torch.nn over one dimension or several, with and without weight and bias; norms written out along any
dimensions, with ε inside, outside or as a bound, and weights in several forms; before them linears, sums or a
convolution, after them numbers, parameters, weights and biases, convolutions, casts, views, writes in place, linears,
sums, other norms. A model is a function of its number.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 6
SHAPES = ((2, 5, WIDTH), (2, *[WIDTH] * 2), (3, WIDTH), (2, 4, 3, WIDTH), (2, *[WIDTH] * 3), (4, 1, WIDTH), (2, 5, 1))
MODULES = ("layer", "layer", "rms", "rms", "group", "instance", "batch")
WRITTEN = ("centred", "squares", "deviation", "normalize", "statistics")
BEFORE = ("nothing", "linear", "linear", "sum", "convolution")
AFTER = (
    "number", "quotient", "negation", "parameter", "linear", "linear", "nothing", "sum", "scaled sum", "cast",
    "in place",
    "transposed", "half", "subtracted", "scaled linear", "sandwich", "affine", "affine", "channels",
)  # fmt: skip


def module_norm(kind: str, shape: tuple[int, ...], draw: random.Random) -> nn.Module:
    """A norm of torch.nn; in eval BatchNorm and InstanceNorm use their running statistics if they have some."""
    over, affine, flag = shape[-min(draw.choice((1, 1, 1, 2)), len(shape)) :], draw.random() < 0.7, draw.random() < 0.5
    channels, rank = shape[1], len(shape)
    if kind == "layer":
        return nn.LayerNorm(over, draw.choice((1e-5, 0.1)), affine, flag)
    if kind == "rms":
        return nn.RMSNorm(over, draw.choice((None, 1e-5, 0.1)), affine)
    if kind == "group" and rank > 2:
        return nn.GroupNorm(draw.choice([g for g in (1, 2, 3, channels) if channels % g == 0]), channels, affine=affine)
    if kind == "instance" and rank in (3, 4):
        made = nn.InstanceNorm1d if rank == 3 else nn.InstanceNorm2d
        return made(channels, affine=affine, track_running_stats=flag or shape[2:].count(1) == rank - 2)
    if kind == "batch":
        return (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d)(channels, affine=affine, track_running_stats=flag)
    return nn.Identity()


class WrittenNorm(nn.Module):
    """A norm as users write it, along one dimension or two."""

    def __init__(self, kind: str, shape: tuple[int, ...], draw: random.Random) -> None:
        super().__init__()
        self.kind, self.eps, self.correction = kind, draw.choice((1e-5, 0.1)), draw.choice((0, 1))
        self.dims = tuple(draw.sample(range(-len(shape), 0), draw.choice((1, 1, 1, 2))))
        self.eps_place, self.form = (
            draw.choice(("inside", "outside", "bound")),
            draw.choice(("w", "1 + w", "exp w", "-w")),
        )
        if all(shape[d] == 1 for d in self.dims):
            self.correction = 0  # of one entry there is no other deviation
        sizes = tuple(n if d - len(shape) in self.dims else 1 for d, n in enumerate(shape))
        sizes = sizes if draw.random() < 0.5 else sizes[min(self.dims) :]
        self.weight = nn.Parameter(torch.randn(sizes)) if draw.random() < 0.6 else None
        self.bias = nn.Parameter(torch.randn(sizes)) if draw.random() < 0.3 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalised(x)
        if self.weight is not None:
            w = self.weight
            y = y * {"w": w, "1 + w": 1 + w, "exp w": w.exp(), "-w": -w}[self.form]
        return y if self.bias is None else y + self.bias

    def _normalised(self, x: Tensor) -> Tensor:
        dims = self.dims
        if self.kind == "statistics":
            y, mean, _ = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
            return y + mean if self.correction else y
        if self.kind == "normalize":
            along: Any = dims[0] if len(dims) == 1 else dims  # torch's annotation lacks several
            return F.normalize(x, dim=along, eps=self.eps)
        if self.kind == "deviation":
            return (x - x.mean(dims, keepdim=True)) / (x.std(dims, correction=self.correction, keepdim=True) + self.eps)
        y = x - x.mean(dims, keepdim=True) if self.kind == "centred" else x
        square = y.pow(2).mean(dims, keepdim=True)
        if self.eps_place == "inside":
            return y * torch.rsqrt(square + self.eps)
        return y / (square.sqrt() + self.eps if self.eps_place == "outside" else square.sqrt().clamp_min(self.eps))


class Net(nn.Module):
    """What stands before a norm, the norm, what stands after it, and perhaps a residual add and a second norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.shape = draw.choice(SHAPES)
        self.first, self.second = (self._norm(draw) for _ in range(2))
        width = self.shape[-1]
        self.enter, self.inner, self.branch = (nn.Linear(width, width, draw.random() < 0.7) for _ in range(3))
        self.read = nn.Linear(width, 3) if draw.random() < 0.7 else nn.Identity()
        self.convolution = nn.Conv1d(self.shape[1], self.shape[1], 1) if len(self.shape) == 3 else nn.Identity()
        self.before, self.after, self.k = draw.choice(BEFORE), draw.choice(AFTER), draw.choice((0.5, -2.0, 3, 1 / 3))
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.factor, self.stream = nn.Parameter(torch.tensor(0.7)), draw.random() < 0.5

    def _norm(self, draw: random.Random) -> nn.Module:
        kind = draw.choice(MODULES + WRITTEN)
        return (WrittenNorm if kind in WRITTEN else module_norm)(kind, self.shape, draw)

    def forward(self, x: Tensor) -> Tensor:
        before: dict[str, Any] = {
            "linear": lambda: self.enter(x),
            "sum": lambda: self.enter(x) + self.inner(x.sin()),
            "convolution": lambda: self.convolution(x),
        }
        h: Tensor = before.get(self.before, lambda: x)()
        y = self._after(self.first(h), h)
        if self.stream and y.shape == h.shape:
            y = self.second(h + self.branch(y))
        out: Tensor = self.read(y) if y.shape[-1] == h.shape[-1] else y
        return out

    def _after(self, y: Tensor, h: Tensor) -> Tensor:
        k = self.k
        if self.after == "in place":
            y = y * 1
            y.mul_(k)
            return y
        after: dict[str, Any] = {
            "number": lambda: y * k,
            "quotient": lambda: y / k,
            "negation": lambda: -y,
            "parameter": lambda: y * self.factor,
            "linear": lambda: self.inner(y),
            "sum": lambda: y + h,
            "scaled sum": lambda: y * k + h,
            "cast": lambda: (y.double() * k).to(h.dtype),
            "transposed": lambda: (y.transpose(-1, -2) * k).transpose(-1, -2),
            "half": lambda: y[..., : max(y.shape[-1] // 2, 1)] * k,
            "subtracted": lambda: 1 - y * k,
            "scaled linear": lambda: self.inner(y * k),
            "sandwich": lambda: self.second(h + k * y),
            "affine": lambda: (
                torch.addcmul(self.beta, y, self.gamma + 1) if k == 0.5 else y * (1 + self.gamma) + self.beta
            ),
            "channels": lambda: self.convolution(y),
        }
        done: Tensor = after.get(self.after, lambda: y)()
        return done


def net(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model of a number, in float64 and eval, its parameters and statistics moved; and its input."""
    torch.manual_seed(seed)
    model = Net(seed).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model, (torch.randn(model.shape, dtype=torch.float64),)
