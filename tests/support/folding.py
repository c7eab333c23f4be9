"""A small model, compiled with kept or frozen folds, and the check that the next call is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfx

KEPT = ("cached", "frozen")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Absolute; outputs are of the size of 1 to 100."""


class Net(nn.Module):
    """A pre-norm block: writers are centred, γ and β go into the readers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        h = h + self.down(torch.tanh(self.up(self.norm1(h))))
        return self.head(self.norm2(h))


def net(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 16) -> Net:
    """Weights of a width of 80 have whole pages of their own, those of 16 share theirs with others."""
    torch.manual_seed(seed)
    return Net(width).to(dtype).eval()


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6).sin()


def compiled(model: Callable[[Tensor], Tensor], fold: str, **options: Any) -> Callable[[Tensor], Tensor]:
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True, **options})

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return call(x)

    return run


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters())


def folding() -> normfx.report.FoldReport:
    """Of the graph compiled last."""
    weights = normfx.compiled_report().graphs[-1].weights
    assert weights is not None
    return weights


def check(call: Callable[[Tensor], Tensor], model: nn.Module, before: Tensor | None = None) -> Tensor:
    """The very next call is right, and, given `before`, differs from what a stale fold would give."""
    dtype = dtype_of(model)
    with torch.no_grad():
        expected = model(X) if dtype == X.dtype else copy.deepcopy(model).double()(X)
    assert torch.allclose(call(X.to(dtype)).double(), expected, rtol=0, atol=TOLERANCES[dtype])
    if before is not None:
        assert (expected - before).abs().max() > 1e-3, "the write does not show: the check could not fail"
    return expected
