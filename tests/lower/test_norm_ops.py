"""The canonical norm ops: the derivative written out is that of the body."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from normfx.ir import ops

KINDS = {kind: (ops.NORMS[kind], ops.BODIES[ops.NORMS[kind]]) for kind in ("rms_norm", "layer_norm")}
FORMS = list(
    itertools.product([-1, 1], [(True, True), (True, False), (False, True), (False, False)], [0, 1], [1.0, 0.3])
)


def _operands(dim: int, affine: tuple[bool, bool], dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, dtype=torch.float64) + 0.5
    d = x.shape[dim]
    vectors = [torch.randn(d, dtype=torch.float64) if wanted else None for wanted in affine]
    return [None if t is None else t.to(dtype).requires_grad_() for t in (x, *vectors)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "affine", "correction", "scale"), FORMS)
def test_derivative(kind: str, dim: int, affine: tuple[bool, bool], correction: int, scale: float) -> None:
    op, body = KINDS[kind]
    tail = (dim, 1e-5, "inside", correction, scale, torch.float64, torch.float64)
    given = [t for t in _operands(dim, affine) if t is not None]
    full = _operands(dim, affine)

    def call(function: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = function(*full, *tail)
        wanted = [t for t in full if t is not None]
        cotangent = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
        return out.detach(), torch.autograd.grad((out * cotangent).sum(), wanted)

    (out, grads), (expected, expected_grads) = call(op), call(body)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert len(grads) == len(given)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivative_are_those_of_finite_differences(kind: str) -> None:
    op, _ = KINDS[kind]
    x, weight, bias = _operands(-1, (True, True))
    tail = (-1, 1e-5, "inside", 0, 1.0, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: op(*t, *tail), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *t: op(*t, *tail), (x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_under_functorch(kind: str) -> None:
    op, body = KINDS[kind]
    x, weight, bias = (t.detach() for t in _operands(-1, (True, True)) if t is not None)
    tail = (-1, 1e-5, "inside", 0, 1.0, torch.float64, torch.float64)

    def gradient(function: Any) -> Tensor:
        each = torch.func.grad(lambda row: function(row, weight, bias, *tail).square().sum())
        return torch.func.vmap(each)(x)

    torch.testing.assert_close(gradient(op), gradient(body), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_one_gain_for_all_features(kind: str) -> None:
    op, body = KINDS[kind]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)
    tail = (-1, 1e-5, "inside", 0, 1.0, torch.float64, torch.float64)
    grads = [torch.autograd.grad(f(x, gain, None, *tail).pow(3).sum(), (x, gain)) for f in (op, body)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_large_mean_and_constant_rows() -> None:
    """Statistics in two passes: a constant row gives β exactly, with a finite gradient."""
    x = torch.full((2, 8), 1000.0, requires_grad=True)
    beta = torch.randn(8)
    out = ops.LAYER_NORM(x, torch.randn(8), beta, -1, 1e-5, "inside", 0, 1.0, torch.float32, torch.float32)
    assert torch.equal(out, beta.expand(2, 8))
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()
