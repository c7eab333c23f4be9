"""Streams that are joined and split again at the same places are read directly: reversible networks."""

from __future__ import annotations

import pytest
import torch
from equivalence import assert_same_float64
from rule_test import moved
from torch import Tensor, nn

D = 8


def _branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D))


class Reversible(nn.Module):
    """Two streams, one value of twice the features between blocks (RevNet-like, as Reformer is written).

    case: what becomes of the value before the second block
    """

    def __init__(self, case: str = "chunk", depth: int = 2) -> None:
        super().__init__()
        self.case = case
        self.table, self.shift = nn.Embedding(11, D), nn.Parameter(torch.ones(2, 3, D))
        self.blocks = nn.ModuleList(nn.ModuleList([_branch(), _branch()]) for _ in range(depth))
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        x = torch.cat([x, x], -1)
        taps: list[Tensor] = []
        for i, (f, g) in enumerate(self.blocks):
            first, second = self._split(x, i, taps)
            first = first + f(second)
            second = second + g(first)
            if self.case == "written":
                taps.append(first * 1.0)
                x = torch.cat((taps[-1], second), dim=-1)
                taps[-1].mul_(2.0)
                continue
            x = torch.cat((first, second), dim=-1)
        total = torch.stack(x.chunk(2, dim=-1)).sum(0)
        return (self.head(self.final(total)), *taps)

    def _split(self, x: Tensor, i: int, taps: list[Tensor]) -> tuple[Tensor, ...]:
        if i and self.case == "split":
            return x.split(D, -1)
        if i and self.case == "sizes":
            return x.split([D, D], -1)
        if i and self.case == "elsewhere":
            a, b, c = x.split([6, 2, D], -1)
            return torch.cat([a, b], -1), c
        if i and self.case == "returned":
            taps += x.chunk(2, -1)
        if i and self.case == "tapped":
            taps.append(x.tanh())
        return x.chunk(2, -1)


ALL = 5


@pytest.mark.parametrize(
    ("case", "converted"),
    [
        ("chunk", ALL),
        ("split", ALL),
        ("sizes", ALL),
        ("elsewhere", 0),
        ("written", None),
        ("returned", 4),
        ("tapped", 4),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_reversible(case: str, converted: int | None, training: bool) -> None:
    torch.manual_seed(0)
    model = moved(Reversible(case)).train(training)
    report = assert_same_float64(model, (torch.arange(6).reshape(2, 3),))
    found = sum("pre_rms_norm" in site.rules for site in report.sites)
    assert converted is None or found == converted


class Halves(nn.Module):
    """A parameter and a value, joined and split; what is made of the halves differs."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.part = case, nn.Parameter(torch.ones(2, 3, D))
        self.norm, self.read = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        part = self.part * 2
        if self.case == "without gradients":
            with torch.no_grad():
                a, b = torch.cat([part, x], -1).chunk(2, -1)
        else:
            a, b = torch.cat([part, x], -1).chunk(2, -1)
        if self.case == "unread":
            a = torch.ones_like(b)
        if self.case == "detached":
            a = a.detach()
        if self.case == "views":
            a = a.reshape(6, D).view(2, 3, D)
        return self.read(self.norm(a + x)), b * 2


@pytest.mark.parametrize("case", ["plain", "unread", "detached", "without gradients", "views"])
def test_gradients_of_halves(case: str) -> None:
    """A half that nothing reads gives zeros, not None; one made where no gradients are recorded gives None."""
    assert_same_float64(moved(Halves(case)), (torch.randn(2, 3, D),), {"fold": "live"})
