"""Folds of weights whose entries lie at places that a module holds without having registered them."""

from __future__ import annotations

import pytest
import torch
from equivalence import EagerBackend
from torch import Tensor, nn
from torch.nn import functional as F

D = 16


class Scattered(nn.Module):
    """A norm read by W and by values at places; the places are integers in a dict (FourierFT, WaveFT, SHiRA)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.linear = nn.Embedding(10, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.values = nn.Parameter(torch.randn(20))
        self.places = {"default": torch.randperm(D * D)[:20]}

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places["default"]
        delta = torch.zeros(D, D)
        delta[places // D, places % D] = self.values
        x = self.norm(self.table(ids))
        return torch.tanh(self.linear(x) * F.linear(x, delta))


def _moved(model: Scattered) -> None:
    model.places["default"] = torch.randperm(D * D)[:20]


def _written(model: Scattered) -> None:
    model.places["default"].copy_(torch.randperm(D * D)[:20])


@pytest.mark.parametrize("fold", ["cached", "live"])
@pytest.mark.parametrize("change", [_moved, _written])
def test_places_that_change(change: object, fold: str) -> None:
    model, ids, backend = Scattered().eval(), torch.arange(8), EagerBackend({"fold": fold})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(ids), model(ids))
            assert callable(change)
            change(model)
    assert len(backend.graphs) == 1 and backend.report.counts["fold_affine"] == 1
    assert backend.kept == (4 if fold == "cached" else 0)
