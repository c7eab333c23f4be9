"""Rounding: rows without variance, and low precision on weights that look trained, beside eager's own error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import LOW_PRECISION, EagerBackend, outputs_and_grads
from torch import Tensor, nn

from normfx.ir import ops

U = 2.0**-24


def _equal_rows(layer: nn.Linear | nn.Embedding) -> None:
    """All output features alike."""
    with torch.no_grad():
        if isinstance(layer, nn.Embedding):
            layer.weight.copy_(layer.weight[:, :1].expand_as(layer.weight))
            return
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
        layer.bias.copy_(layer.bias[:1].expand_as(layer.bias))


class Constant(nn.Module):
    """A norm of rows all of whose entries are equal."""

    def __init__(self, kind: str, d: int, eps: float) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Embedding(8, d)
        self.one, self.two = nn.Linear(32, d), nn.Linear(32, d)
        self.norm, self.read = nn.LayerNorm(d // 4 if kind == "heads" else d, eps=eps), nn.Linear(d, 3)
        for layer in (self.table, self.one, self.two):
            _equal_rows(layer)

    def forward(self, a: Tensor, ids: Tensor) -> Tensor:
        x = self.one(a)
        if self.kind == "heads":
            return self.norm(x.unflatten(-1, (4, -1)))
        if self.kind == "stream":
            x = self.table(ids) + x + self.two(torch.tanh(a))
        out: Tensor = self.read(self.norm(x))
        return out


@pytest.mark.parametrize("fold", ["live", "cached"])
@pytest.mark.parametrize(("kind", "rules"), [("one", "default"), ("heads", "default"), ("stream", "+crms_norm")])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_rows_without_variance(kind: str, rules: str, eps: float, fold: str) -> None:
    """With one mean subtracted the rows hold u|x|, which ε = 1e-12 makes 0.1 to 1."""
    torch.manual_seed(0)
    model = Constant(kind, 96, eps)
    given = torch.randn(4, 5, 32), torch.randint(0, 8, (4, 5))
    backend = EagerBackend({"fold": fold, "rules": f"default,{rules}"})
    torch._dynamo.reset()
    with torch.no_grad():
        want = copy.deepcopy(model).double()(given[0].double(), given[1])
        got = torch.compile(model, backend=backend, fullgraph=True)(*given)
    assert backend.report.counts["to_rms_norm"] == 1
    size = 10 * max(1.0, want.abs().max().item())
    assert (got - want).abs().max() <= size * (U + 10 * U**2 / eps**0.5)


@pytest.mark.parametrize("basis", ["", "drop", "orthonormal"])
@pytest.mark.parametrize("dim", [0, 1])
def test_equal_entries_are_centred_to_u_squared(basis: str, dim: int) -> None:
    value = torch.tensor([0.1, 1 / 3, 7.7, -123.456]).unsqueeze(dim)
    rows = value.expand(4, 96) if dim else value.expand(96, 4)
    if basis:
        centred = ops.compress(rows, dim, basis, 3, 95, torch.float32)
    else:
        centred = ops.center(rows, dim, 96, 1, torch.float32)
    if dim == 0 and not basis:  # inside of blocks too
        centred = torch.cat([centred, ops.center(rows, dim, 24, 1, torch.float32)])
    assert (centred.abs() <= 100 * U**2 * value.abs()).all()


def test_derivative_of_a_centring() -> None:
    """P, also though the second mean is constant to autograd; and it can be differentiated again."""
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    for args in ((0, 12, 1), (0, 4, 1), (0, 4, 3)):
        call: Callable[[Tensor], Tensor] = lambda t, args=args: ops.CENTER(t, *args, torch.float64)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x,))
        assert torch.autograd.gradgradcheck(call, (x,))


class Trained(nn.Module):
    """Pre-norm blocks with a head, or one norm and one reader, with parameters as training leaves them.

    mean:    weights, β and biases have means as large as their spread, or ten times as large
    outlier: a channel of γ, β and of the writers far above the others
    tiny:    γ near 0.01, one entry 0
    """

    def __init__(self, kind: str, blocks: int, bias: bool = True, d: int = 128) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(d, d), nn.Linear(d, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(d, bias=bias) for _ in range(blocks + 1))
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(blocks))
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.add_(0.3 * torch.randn(d))
                if kind == "tiny":
                    norm.weight.mul_(0.01)[5] = 0.0
                if kind == "outlier":
                    norm.weight[3] = 5.0
                if bias:
                    norm.bias.copy_(0.3 * torch.randn(d) + {"mean": 10.0}.get(kind, 0.0))
            for linear in (self.start, self.head, *self.ups, *self.downs):
                linear.bias.add_(0.3 * torch.randn_like(linear.bias))
                if kind == "mean":
                    linear.weight.add_(linear.weight.std())
                    linear.bias.add_(1.0)
            if kind == "outlier":
                for writer in (self.start, *self.downs):
                    writer.weight[3].mul_(20.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.ups:
            x = self.start(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        out: Tensor = self.head(self.norms[-1](x))
        return out


def _distance(
    results: list[tuple[list[Tensor], dict[str, Any]]], true: list[tuple[list[Tensor], dict[str, Any]]]
) -> tuple[float, float]:
    """Errors of outputs and of gradients, each gradient relative to its own length, over several models."""
    outs = grads = 0.0
    for (out, own), (want, exact) in zip(results, true, strict=True):
        outs += sum(((a.double() - b).norm() / b.norm()).item() ** 2 for a, b in zip(out, want, strict=True))
        for name, grad in exact.items():
            if grad is not None and grad.norm() > 0:
                grads += ((own[name].double() - grad).norm() / grad.norm()).item() ** 2
    return outs**0.5, grads**0.5


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["autocast", "stored"])
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("kind", ["mean", "outlier", "tiny"])
def test_weights_that_look_trained(kind: str, blocks: int, mode: str, low: torch.dtype) -> None:
    """Outputs and gradients, over two models each, with β and (half of them) without."""
    found: dict[str, list[Any]] = {"true": [], "eager": [], "own": []}
    for bias in (True, False):
        torch.manual_seed(0)
        model = Trained(kind, blocks, bias)
        x = torch.randn(2, 48, 128).to(low if mode == "stored" else torch.float32)
        model = model.to(low) if mode == "stored" else model
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=EagerBackend(), fullgraph=True)
        exact = copy.deepcopy(model).double()
        found["true"].append(outputs_and_grads(exact, exact, (x.double(),)))
        for name, call in (("eager", model), ("own", compiled)):
            with torch.autocast("cpu", low, enabled=mode == "autocast"):
                found[name].append(outputs_and_grads(call, model, (x,)))
    own, eager = (_distance(found[name], found["true"]) for name in ("own", "eager"))
    bound = LOW_PRECISION[torch.bfloat16]
    assert own[0] <= bound * eager[0], f"outputs {own[0] / eager[0]:.2f}"
    assert own[1] <= bound * eager[1], f"gradients {own[1] / eager[1]:.2f}"
