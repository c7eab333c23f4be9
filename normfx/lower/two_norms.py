"""Two norms with a residual add between them as one op that runs on a generated kernel: `normfx::two_norms`.

    s = norm₁(x) + alpha·residual,  y = norm₂(s)

Its derivative is that of each norm, one after the other (`normfx::norm_backward`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfx.ir.form import Form, flat, gathered
from normfx.kernels import run
from normfx.lower.norm_ops import kernel_spec, need_statistics, normalised, triton_op, wrap


def _two_norms(
    x: Tensor,
    residual: Tensor,
    inner_weight: Tensor | None,
    inner_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    inner: Form,
    form: Form,
    alpha: float,
    statistics: bool,
) -> list[Tensor]:
    """[y, s in x's dtype] and, if `statistics`, [rstd of s, rstd of x, mean of s if the form centres, mean of x if the
    inner form does]. Neither norm is of compressed rows; the inner one's rows have the dtype of x."""
    if x.is_cuda:
        spec = kernel_spec(x, residual, weight, bias, form, alpha, inner=(inner, inner_weight, inner_bias))
        vectors = (inner_weight, inner_bias, inner.eps)
        found = run.forward(spec, x, form.eps, residual, weight, bias, statistics, wrap=wrap, inner=vectors)
        results = (found.out, found.sum, found.rstd, found.inner_rstd, found.mean, found.inner_mean)
        return [t for t in results if t is not None]
    first, mean_1, rstd_1 = normalised(x, inner_weight, inner_bias, inner)
    s = (first + alpha * residual).to(x.dtype)
    out, mean, rstd = normalised(s, weight, bias, form)
    kept = [t.squeeze(-1) for t in (rstd, rstd_1, mean, mean_1) if t is not None] if statistics else []
    return [out.to(form.out_dtype), s, *kept]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, *vectors, ctx.inner, ctx.form, ctx.alpha, statistics = gathered(_two_norms, inputs)
    ctx.residual = residual.dtype
    need_statistics(statistics)
    means = output[4:]
    mean = means.pop(0) if ctx.form.centres else None
    mean_1 = means.pop(0) if ctx.inner.centres else None
    ctx.save_for_backward(x, output[1], output[2], mean, output[3], mean_1, *vectors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, s, rstd, mean, rstd_1, mean_1, weight_1, bias_1, weight, bias = ctx.saved_tensors
    inner, form, alpha = ctx.inner, ctx.form, ctx.alpha
    grad = torch.zeros_like(s, dtype=form.out_dtype) if grads[0] is None else grads[0]
    op = torch.ops.normfx.norm_backward
    second = list(op(grad, s, rstd, mean, weight, bias, None, grads[1], True, *form, alpha))
    ds = second.pop(0)
    first = list(op(ds, x, rstd_1, mean_1, weight_1, bias_1, None, None, False, *inner, 1.0))
    dx = first.pop(0)
    vectors = [
        part.pop(0) if vector is not None else None
        for vector, part in ((weight_1, first), (bias_1, first), (weight, second), (bias, second))
    ]
    residual_grad = (ds if alpha == 1.0 else ds * alpha).to(ctx.residual)
    return (dx, residual_grad, *vectors, *(None for _ in (*inner, *form, alpha, "statistics")))


triton_op("normfx::two_norms", mutates_args=())(flat(_two_norms)).register_autograd(_backward, setup_context=_setup)
TWO_NORMS = torch.ops.normfx.two_norms.default
