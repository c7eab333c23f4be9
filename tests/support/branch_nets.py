"""Random sums of convolutions, BatchNorms and other functions of one value, for merge_branches."""

from __future__ import annotations

import random

import torch
from batch_norm_nets import moved
from torch import Tensor, nn

from normfx.report import Report

CHANNELS = 4


def decided(report: Report) -> list[str]:
    """Say "applied" of each sum, or the codes of its refusals."""
    sites = [site for site in report.composed if site.kind == "Branches"]
    return ["applied" if site.rules else ", ".join(r.code for r in site.refusals) for site in sites]


def _layer(draw: random.Random) -> nn.Module:
    """A convolution that keeps the size of what it reads."""
    kernel, dilation = draw.choice((1, 1, 3, 3, 5)), draw.choice((1, 1, 1, 2))
    groups, bias = draw.choice((1, 1, 1, 2, CHANNELS)), draw.random() < 0.5
    padding = draw.choice(("same", dilation * (kernel - 1) // 2))
    mode = draw.choice(("zeros",) * 5 + ("circular",))
    return nn.Conv2d(
        CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )


class Term(nn.Module):
    """Some layers, one after the other, of x or of a function of x."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        kinds = ["layer"] * 4 + ["layer norm", "norm", "itself", "two", "tanh"]
        self.kind = draw.choice(kinds)
        self.layer, self.norm, self.last = _layer(draw), nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "layer norm":
                x = self.norm(self.layer(x))
            case "norm":
                x = self.norm(x)
            case "two":
                x = self.last(self.layer(x))
            case "tanh":
                x = self.layer(torch.tanh(x))
            case "layer":
                x = self.layer(x)
        return x


class Drawn(nn.Module):
    """A tree of sums, differences and products with numbers, over two to six terms, between two functions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.terms = nn.ModuleList(Term(draw) for _ in range(draw.randint(2, 6)))
        self.steps = [(draw.randrange(5), draw.randrange(100), draw.choice((1, 1, 2.0, -0.5))) for _ in self.terms]
        self.read_again = draw.random() < 0.15
        moved(self, seed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.sin(x)
        parts = [term(x) for term in self.terms]
        again = parts[0].sum() if self.read_again else x.sum()
        for kind, place, factor in self.steps[1:]:
            first, second = parts.pop(place % len(parts)), parts.pop()
            match kind:
                case 0:
                    joined = torch.add(first, second, alpha=factor)
                case 1:
                    joined = torch.sub(first, second, alpha=factor)
                case 2:
                    joined = (first * factor + second) / 3
                case 3:
                    joined = -first + second * factor
                case _:
                    joined = first - second + 0
            parts.insert(place % (len(parts) + 1), joined)
        return torch.relu(parts[0]), again


class Written(nn.Module):
    """A random sum, some terms of which are another input, or a view of it, that is written between the other terms."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(draw.randint(2, 4)))
        self.steps = ["layer"] * (len(self.layers) - 1) + draw.choices(("add", "add view", "write", "write view"), k=3)
        draw.shuffle(self.steps)
        moved(self, seed)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        layers = iter(self.layers)
        total = next(layers)(x)
        for step in self.steps:
            match step:
                case "layer":
                    total = next(layers)(x) + total
                case "add":
                    total = total + z
                case "add view":
                    total = z.view_as(z) - total
                case "write":
                    z.mul_(2.0)
                case _:
                    z[0].add_(1.0)
        return torch.relu(total)


class Adapted(nn.Module):
    """A linear and a low-rank one next to it, as `adapter(layer(x))` of LoRA is computed."""

    def __init__(self, wide: nn.Module, n: int, m: int) -> None:
        super().__init__()
        self.wide, self.down, self.up = wide, nn.Linear(n, 2, bias=False), nn.Linear(2, m)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.wide(x) + self.up(self.down(x)) * 1.5
        return total


class Rows(nn.Module):
    """A product of rows in two dimensions, as the Conv1D of transformers is."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.randn(m))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
