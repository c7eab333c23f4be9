"""The op that runs on generated kernels: its meaning on the CPU, its derivative, its place in real graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

pytest.importorskip("triton")

from normfx.ir.form import Form, Kind
from normfx.lower.norm_ops import NORM
from normfx.lower.two_norms import TWO_NORMS


def form(
    centre: bool, compressed: bool = False, alpha: float = 1.0, statistics: bool = True, **other: Any
) -> tuple[Any, ...]:
    kind: Kind = "layer_norm" if centre else "crms_norm" if compressed else "rms_norm"
    plain = Form(kind, -1, 1e-5, "inside", 0, 1.0, torch.float64, torch.float64)
    return (*plain._replace(**other), alpha, statistics, True)


def inputs(residual: bool, affine: bool) -> tuple[Tensor | None, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    return random(2, 3, 8), random(2, 3, 8) if residual else None, *(random(8) if affine else None for _ in range(2))


CASES = [(c, r, a) for c in (True, False) for r in (True, False) for a in (True, False)]


@pytest.mark.parametrize(("centre", "residual", "affine"), CASES)
def test_meaning(centre: bool, residual: bool, affine: bool) -> None:
    x, r, w, b = inputs(residual, affine)
    out, rstd, *rest = NORM(x, r, w, b, None, *form(centre, alpha=0.5))
    s = x if r is None else x + 0.5 * r
    norm = F.layer_norm(s, (8,), w, b) if centre else F.rms_norm(s, (8,), w, 1e-5) + (b if b is not None else 0)
    torch.testing.assert_close(out, norm, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        rstd, torch.rsqrt(s.var(-1, correction=0) + 1e-5) if centre else torch.rsqrt(s.square().mean(-1) + 1e-5)
    )
    assert len(rest) == centre + residual
    if residual:
        torch.testing.assert_close(rest[-1], s)


@pytest.mark.parametrize(("centre", "residual", "affine"), CASES)
def test_without_statistics(centre: bool, residual: bool, affine: bool) -> None:
    """The same rows and sum, and nothing else: there is no derivative."""
    given = inputs(residual, affine)
    whole = NORM(*given, None, *form(centre, alpha=0.5))
    with torch.no_grad():
        found = NORM(*given, None, *form(centre, alpha=0.5, statistics=False))
    wanted = [whole[0], *whole[-1:]] if residual else whole[:1]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    with pytest.raises(RuntimeError, match="compiled without gradients"):
        NORM(*given, None, *form(centre, alpha=0.5, statistics=False))


@pytest.mark.parametrize("residual", [True, False])
def test_meaning_of_compressed_rows(residual: bool) -> None:
    """The entry that is not stored is what makes the sum 0; the divisor counts it."""
    x, r, _, _ = inputs(residual, False)
    out, *_ = NORM(x, r, None, None, None, *form(False, compressed=True, correction=-1))
    s = x if r is None else x + r
    row = torch.cat([s, -s.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(out, F.rms_norm(row, (9,), None, 1e-5)[..., :8], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("centre", "compressed"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_derivative(centre: bool, compressed: bool, residual: bool, affine: bool) -> None:
    given = inputs(residual, affine)
    settings = form(centre, compressed=compressed, alpha=0.5, scale=2.0, correction=1)

    def run(*tensors: Tensor | None) -> list[Tensor]:
        found = NORM(*tensors, None, *settings)
        return [found[0], *([found[-1]] if residual else [])]

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("affine", [True, False])
def test_centred_output(affine: bool) -> None:
    given, settings = inputs(True, affine), form(True, scale=2.0, centre_output=True)
    plain, centred = NORM(*given, None, *form(True, scale=2.0))[0], NORM(*given, None, *settings)[0]
    torch.testing.assert_close(centred, plain - plain.mean(-1, keepdim=True), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *tensors: NORM(*tensors, None, *settings)[0], given)


@pytest.mark.parametrize(("centre", "residual", "affine"), [(True, True, True), (False, False, False)])
def test_opcheck(centre: bool, residual: bool, affine: bool) -> None:
    x_bias = torch.randn(8, dtype=torch.float64, requires_grad=True) if residual else None
    library.opcheck(NORM, (*inputs(residual, affine), x_bias, *form(centre)))


@pytest.mark.parametrize(("centre", "affine"), [(True, True), (False, False), (True, False)])
def test_bias_of_the_writer(centre: bool, affine: bool) -> None:
    """s = x + x_bias + alpha · residual; the gradient of x_bias is that of x, summed over rows."""
    x, r, w, b = inputs(True, affine)
    x_bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    settings = form(centre, alpha=0.5, scale=2.0)
    assert x is not None
    for got, want in zip(NORM(x, r, w, b, x_bias, *settings), NORM(x + x_bias, r, w, b, None, *settings), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def run(*tensors: Tensor | None) -> list[Tensor]:
        found = NORM(*tensors, *settings)
        return [found[0], found[-1]]

    assert torch.autograd.gradcheck(run, (x, r, w, b, x_bias))


def sandwich(centred: bool, correction_1: int = 0, **other: Any) -> tuple[Any, ...]:
    inner = Form("layer_norm", -1, 1e-3, "inside", correction_1, 0.5, torch.float64, torch.float64, centred)
    kind: Kind = "rms_norm" if centred else "layer_norm"
    outer = Form(kind, -1, 1e-5, "inside", 0, 1.0, torch.float64, torch.float64)
    return (*inner, *outer._replace(**other), 2.0, True)


def rows(affine: bool) -> tuple[Tensor | None, ...]:
    x, residual, weight, bias = inputs(True, affine)
    return x, residual, weight, bias, *inputs(False, affine)[2:]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_meaning_of_two_norms(centred: bool, affine: bool) -> None:
    x, r, w1, b1, w, b = rows(affine)
    out, s, rstd, rstd_1, *means = TWO_NORMS(x, r, w1, b1, w, b, *sandwich(centred))
    first = 0.5 * F.layer_norm(x, (8,), w1, b1, 1e-3)
    first = first - first.mean(-1, keepdim=True) if centred else first
    total = first + 2.0 * r
    norm = F.rms_norm(total, (8,), w, 1e-5) + (b if b is not None else 0)
    torch.testing.assert_close(s, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, norm if centred else F.layer_norm(total, (8,), w, b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rstd_1, torch.rsqrt(x.var(-1, correction=0) + 1e-3))
    assert rstd.shape == rstd_1.shape and len(means) == 1 + (not centred)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_derivative_of_two_norms(centred: bool, affine: bool) -> None:
    def run(*tensors: Tensor | None) -> list[Tensor]:
        return TWO_NORMS(*tensors, *sandwich(centred, correction_1=1, scale=1.5))[:2]

    assert torch.autograd.gradcheck(run, rows(affine))


def test_opcheck_of_two_norms() -> None:
    library.opcheck(TWO_NORMS, (*rows(True), *sandwich(True)))
