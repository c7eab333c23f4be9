"""Rounding: rows without variance, and low precision on weights that look trained, compared with eager's own error."""

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
    """Rows with one mean subtracted hold u|x|, which ε = 1e-12 makes 0.1 to 1."""
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


class Stack(nn.Module):
    """Pre-norm blocks with a head; without blocks one norm and its reader."""

    def __init__(self, blocks: int, bias: bool, d: int = 128) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(d, d), nn.Linear(d, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(d, bias=bias) for _ in range(blocks + 1))
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        if self.ups:
            x = self.start(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        out: Tensor = self.head(self.norms[-1](x))
        return out


def train(model: Stack, kind: str) -> None:
    """Parameters as training leaves them, in place.

    mean:    weights and biases have means as large as their spread, β of thirty times
    outlier: a channel of the stream with an offset far above the others, and small γ for it; one of γ is large
    tiny:    γ near 0.01, one entry 0
    """
    writers = (model.start, *model.downs)
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(1 + 0.3 * torch.randn_like(norm.weight))
            if kind == "tiny":
                norm.weight.mul_(0.01)[5] = 0.0
            if kind == "outlier":
                norm.weight[3], norm.weight[7] = 0.05, 5.0
            if norm.bias is not None:
                norm.bias.copy_(0.3 * torch.randn_like(norm.bias) + (10.0 if kind == "mean" else 0.0))
        for linear in (*writers, model.head, *model.ups):
            shift = float(kind == "mean")
            linear.weight.copy_((shift + torch.randn_like(linear.weight)) / (3 * linear.in_features) ** 0.5)
            linear.bias.copy_(shift + 0.3 * torch.randn_like(linear.bias))
        if kind == "outlier":
            for writer in writers:
                writer.bias[3] += 20.0


FLOOR = 1e-3
"""Gradients shorter than this part of the longest are compared at its scale: those that are 0 are all round-off."""


def _errors(found: tuple[list[Tensor], dict[str, Any]], true: tuple[list[Tensor], dict[str, Any]]) -> Tensor:
    """Squared, of the output and of all gradients, each relative to its length."""
    (out,), (want,) = found[0], true[0]
    grads = [(found[1][name], grad) for name, grad in true[1].items() if grad is not None]
    largest = max(grad.norm() for _, grad in grads)
    parts = [(own.double() - grad).norm() / grad.norm().clamp(min=FLOOR * largest) for own, grad in grads]
    return torch.stack([(out.double() - want).norm() / want.norm(), torch.stack(parts).norm()]).square()


QUICK = {
    ("autocast", torch.bfloat16, 0, True),
    ("autocast", torch.bfloat16, 2, True),
    ("stored", torch.bfloat16, 2, True),
}
MODES = (("autocast", torch.bfloat16), ("autocast", torch.float16), ("stored", torch.bfloat16))
SETTINGS = [(*mode, blocks, bias) for mode in MODES for blocks in (0, 2) for bias in (True, False)]


@pytest.mark.parametrize(
    ("mode", "low", "blocks", "bias"),
    [pytest.param(*s, marks=() if s in QUICK else (pytest.mark.slow,)) for s in SETTINGS],
)
def test_weights_that_look_trained(mode: str, low: torch.dtype, blocks: int, bias: bool) -> None:
    """Outputs and gradients, over four models of each kind: the error of an outlier is one random number."""
    torch.manual_seed(0)
    model = Stack(blocks, bias)
    kept = copy.deepcopy(model).double()
    model = model.to(low) if mode == "stored" else model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=EagerBackend(), fullgraph=True)
    for kind in ("plain", "mean", "outlier", "tiny"):
        eager = own = torch.zeros(2, dtype=torch.float64)
        for _ in range(4):
            train(model, kind)
            kept.load_state_dict(model.state_dict())
            x = torch.randn(2, 48, 128).to(next(model.parameters()).dtype)
            true = outputs_and_grads(kept, kept, (x.double(),))
            with torch.autocast("cpu", low, enabled=mode == "autocast"):
                eager = eager + _errors(outputs_and_grads(model, model, (x,)), true)
                own = own + _errors(outputs_and_grads(compiled, model, (x,)), true)
        ratio = (own / eager).sqrt()
        assert (ratio <= LOW_PRECISION[torch.bfloat16]).all(), f"{kind}: {ratio.tolist()}"
