"""Sums in which the output of one linear stands several times, each time with another factor for each feature."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from capturing import Backend
from equivalence import assert_same_float64
from rule_test import moved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from normfx.capture.multiples import gather_multiples

D = 8
IDS = torch.arange(8).reshape(2, 4)


class Layer(nn.Module):
    """A linear whose output `form` adds to multiples of itself."""

    def __init__(self, form: Callable[[Layer, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(D, D)
        self.left, self.right = nn.Linear(D, 3, bias=False), nn.Linear(3, D, bias=False)
        self.magnitude, self.scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(1, D))
        self.rows = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x, self.linear(x))


class Block(nn.Module):
    """Two blocks whose outputs are written so."""

    def __init__(self, form: Callable[[Layer, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, D), nn.Linear(D, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
        self.layers = nn.ModuleList(Layer(form) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(F.gelu(norm(x)))
        return self.head(self.norms[-1](x))


def magnitude(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    """DoRA: (W + s·BA) with rows of trained length; the length that they had counts as a constant."""
    delta = m.right(m.left(torch.eye(D, dtype=x.dtype))).T
    length = torch.linalg.norm(m.linear.weight + 0.5 * delta, dim=1).detach()
    factor = (m.magnitude / length).view(1, -1)
    return y + ((factor - 1) * (y - m.linear.bias) + factor * m.right(m.left(x)) * 0.5)


def _partly_without_gradient(m: Layer, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scaled = y * m.scale
    return y + scaled


GATHERED: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "magnitude": magnitude,
    "scaled first": lambda m, x, y: y * m.scale + (m.right(x[..., :3]) + y),
    "divided": lambda m, x, y: y / m.scale + (m.right(m.left(x)) + y),
    "three times": lambda m, x, y: y * m.scale + (y * m.magnitude + y),
    "twice": lambda m, x, y: y * m.scale + y * m.magnitude,
    "without its bias": lambda m, x, y: (y - m.linear.bias) * m.scale + m.linear.bias,
    "shifted": lambda m, x, y: (y + m.scale) * m.magnitude - m.scale + y,
}

LEFT: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "read elsewhere": lambda m, x, y: y + y * m.scale + torch.tanh(y),
    "without gradient": _partly_without_gradient,
    "along two axes": lambda m, x, y: y * m.scale + y * m.rows,
    "numbers alone": lambda m, x, y: y + y * 0.5,
    "a factor of data": lambda m, x, y: y + y * torch.sigmoid(x),
    "its own factor": lambda m, x, y: y + y * y,
    "broadcast": lambda m, x, y: y * m.scale + (y[:, :1] + y),
    "checkpointed": lambda m, x, y: y + checkpoint(lambda z: torch.tanh(z * m.scale), y, use_reentrant=False),
}


@pytest.mark.parametrize("form", GATHERED)
def test_sums_of_multiples(form: str) -> None:
    """Such a layer is centred as a linear is."""
    report = assert_same_float64(moved(Block(GATHERED[form])), (IDS,))
    assert report.counts["to_rms_norm"] == 3, report


@pytest.mark.parametrize("form", LEFT)
def test_other_sums(form: str) -> None:
    block, backend = moved(Block(LEFT[form])), Backend()
    torch.compile(block, backend=backend, fullgraph=True)(IDS)
    (captured,) = backend.seen
    assert not gather_multiples(captured.graph_module, captured.weights)
    assert_same_float64(block, (IDS,))


def test_half_precision_stays() -> None:
    block, backend = Block(magnitude).bfloat16(), Backend()
    torch.compile(block, backend=backend, fullgraph=True)(IDS)
    (captured,) = backend.seen
    assert not gather_multiples(captured.graph_module, captured.weights)
