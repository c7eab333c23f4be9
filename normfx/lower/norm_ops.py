"""A norm, with a residual add, as one op that runs on a generated kernel: `normfx::norm` and its derivative.

On CUDA each is a launch of Triton kernels that Inductor sees (`triton_op`); on every other device the formula, in ATen.
Derivatives are ops too, so AOTAutograd's partitioner moves nothing into or out of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, library

from normfx.ir.centring import accumulation_dtype
from normfx.ir.form import Form, flat, gathered
from normfx.kernels import run
from normfx.kernels.spec import Inner, Spec

triton_op: Callable[..., Any] = library.triton_op  # torch leaves these untyped
wrap: Callable[[Any], Any] = library.wrap_triton


def kernel_spec(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    alpha: float = 1.0,
    keeps_sum: bool = True,
    inner: tuple[Form, Tensor | None, Tensor | None] | None = None,
    x_bias: Tensor | None = None,
) -> Spec:
    """The kernel of a norm of these tensors, over their last dimension, with ε inside the root.

    keeps_sum: the sum with the residual is stored; inner: form, weight and bias of the norm before the residual add;
    x_bias: a vector that is added to each row of the sum
    """
    spec = Spec(
        width=int(x.shape[-1]) + form.compressed,
        centre=form.centres,
        compressed=form.compressed,
        x=_name(x.dtype),
        out=_name(form.out_dtype),
        weight=_name(weight.dtype) if weight is not None else None,
        bias=_name(bias.dtype) if bias is not None else None,
        residual=_name(residual.dtype) if residual is not None else None,
        sum=_name(x.dtype) if residual is not None and keeps_sum else None,
        alpha=alpha,
        scale=form.scale,
        correction=form.correction + form.compressed,
        centre_output=form.centre_output,
        x_bias=_name(x_bias.dtype) if x_bias is not None else None,
    )
    if inner is None:
        return spec
    one = kernel_spec(x, None, inner[1], inner[2], inner[0])
    before = Inner(one.centre, one.weight, one.bias, one.scale, one.correction, one.centre_output)
    return replace(spec, inner=before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    form: Form,
    alpha: float,
    statistics: bool,
    keeps_sum: bool,
) -> list[Tensor]:
    """[y, rstd, mean if the form centres, s if there is a residual]: s = x + x_bias + alpha · residual in x's dtype, y
    the norm of s over its last dimension, rstd and mean of each row in float32 (float64 for float64). rstd and mean
    only if `statistics`, s only if `keeps_sum`: the derivative reads all of them."""
    if x.is_cuda:
        spec = kernel_spec(x, residual, weight, bias, form, alpha, keeps_sum, x_bias=x_bias)
        found = run.forward(spec, x, form.eps, residual, weight, bias, statistics, wrap=wrap, x_bias=x_bias)
        results = (found.out, found.rstd, found.mean, found.sum)
        return [t for t in results if t is not None]
    s = x if x_bias is None else (x + x_bias).to(x.dtype)
    s = s if residual is None else s + alpha * residual
    out, mean, rstd = normalised(s, weight, bias, form)
    kept = [t.squeeze(-1) for t in (rstd, mean) if t is not None] if statistics else []
    return [out.to(form.out_dtype), *kept, *([s] if residual is not None and keeps_sum else [])]


def normalised(
    s: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm of s, not rounded, and the mean and rstd of each row, kept as a dimension."""
    wide, mean, rstd = _statistics(s, form)
    out = (wide - mean if mean is not None else wide) * rstd
    if weight is not None:
        out = out * weight.to(out.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    out = out * form.scale
    return out - out.mean(-1, keepdim=True) if form.centre_output else out, mean, rstd


def _statistics(s: Tensor, form: Form) -> tuple[Tensor, Tensor | None, Tensor]:
    wide = s.to(accumulation_dtype(s.dtype))
    mean = wide.mean(-1, keepdim=True) if form.centres else None
    centred = wide - mean if mean is not None else wide
    squares = centred.square().sum(-1, keepdim=True)
    if form.compressed:
        squares = squares + wide.sum(-1, keepdim=True).square()
    return wide, mean, torch.rsqrt(squares / (s.shape[-1] - form.correction) + form.eps)


def _norm_backward(
    grad: Tensor,
    saved: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    sum_grad: Tensor | None,
    residual: bool,
    form: Form,
    alpha: float,
) -> list[Tensor]:
    """[ds, dγ if there is a weight, dβ if there is a bias, Σds if there is an x_bias]; saved: s. Source of the formula:
    ir/ops.py."""
    if saved.is_cuda:
        spec = kernel_spec(saved, saved if residual else None, weight, bias, form, alpha, x_bias=x_bias)
        found = run.backward(spec, grad, saved, rstd, mean, weight, sum_grad, wrap=wrap)
        return [t for t in found if t is not None]
    wide = saved.to(rstd.dtype)
    scales = rstd.unsqueeze(-1)
    normal = (wide - mean.unsqueeze(-1) if mean is not None else wide) * scales
    outer = grad.to(wide.dtype) * form.scale
    if form.centre_output:
        outer = outer - outer.mean(-1, keepdim=True)
    inner = outer if weight is None else outer * weight.to(wide.dtype)
    normals = normal + normal.sum(-1, keepdim=True) if form.compressed else normal
    dx = inner - normals * ((inner * normal).sum(-1, keepdim=True) / (saved.shape[-1] - form.correction))
    if form.centres:
        dx = dx - inner.mean(-1, keepdim=True)
    dx = dx * scales
    if sum_grad is not None:
        dx = dx + sum_grad.to(dx.dtype)
    over = [*range(saved.ndim - 1)]
    grads = [dx.to(saved.dtype)]
    if weight is not None:
        terms = outer * normal
        grads.append((terms.sum(over) if over else terms).to(weight.dtype))
    if bias is not None:
        grads.append((outer.sum(over) if over else outer.clone()).to(bias.dtype))
    if x_bias is not None:
        grads.append((dx.sum(over) if over else dx.clone()).to(x_bias.dtype))
    return grads


def need_statistics(kept: bool) -> None:
    """Raises if an op that keeps no statistics, or no sum, is differentiated. normfx writes such ops only where no
    gradients are recorded."""
    if not kept:
        raise RuntimeError("normfx: a norm that was compiled without gradients is differentiated; please report this")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, *vectors, ctx.form, ctx.alpha, statistics, keeps_sum = gathered(_norm, inputs)
    need_statistics(statistics and keeps_sum)
    mean = output[2] if ctx.form.centres else None
    saved = output[-1] if residual is not None else x
    ctx.residual = residual.dtype if residual is not None else None
    ctx.save_for_backward(saved, output[1], mean, *vectors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, rstd, mean, *vectors = ctx.saved_tensors
    form, alpha, residual = ctx.form, ctx.alpha, ctx.residual
    grad, sum_grad = grads[0], grads[-1] if residual is not None else None
    if grad is None:
        grad = torch.zeros_like(saved, dtype=form.out_dtype)
    op = torch.ops.normfx.norm_backward
    found = list(op(grad, saved, rstd, mean, *vectors, sum_grad, residual is not None, *form, alpha))
    ds = found.pop(0)
    vector_grads = [found.pop(0) if vector is not None else None for vector in vectors]
    residual_grad = None
    if residual is not None and ctx.needs_input_grad[1]:
        residual_grad = (ds if alpha == 1.0 else ds * alpha).to(residual)
    return (ds, residual_grad, *vector_grads, *(None for _ in (*form, alpha, "statistics", "keeps_sum")))


triton_op("normfx::norm_backward", mutates_args=())(flat(_norm_backward))
triton_op("normfx::norm", mutates_args=())(flat(_norm)).register_autograd(_backward, setup_context=_setup)
NORM = torch.ops.normfx.norm.default
