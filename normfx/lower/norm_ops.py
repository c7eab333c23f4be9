"""A norm, with a residual add, as one op that runs on a generated kernel: `normfx::norm` and its derivative.

On CUDA each is a launch of Triton kernels that Inductor sees (`triton_op`); on every other device the formula, in ATen.
Derivatives are ops too, so AOTAutograd's partitioner moves nothing into or out of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from normfx.ir.ops import accumulation_dtype
from normfx.kernels import run
from normfx.kernels.spec import Spec

triton_op: Callable[..., Any] = library.triton_op  # torch leaves these untyped
wrap: Callable[[Any], Any] = library.wrap_triton


class Form(NamedTuple):
    """The arguments of a norm op after its tensors, in the order of its schema. See kernels/spec.py; the divisor is
    the number of stored entries − correction. statistics: whether the op returns the mean and rstd of rows, which its
    derivative reads; keeps_sum: whether it returns the sum, which its derivative reads too."""

    centre: bool
    compressed: bool
    eps: float
    scale: float
    correction: int
    alpha: float
    out_dtype: torch.dtype
    centre_output: bool = False
    statistics: bool = True
    keeps_sum: bool = True

    def spec(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x_bias: Tensor | None = None,
    ) -> Spec:
        return Spec(
            width=int(x.shape[-1]) + self.compressed,
            centre=self.centre,
            compressed=self.compressed,
            x=_name(x),
            out=_dtype_name(self.out_dtype),
            weight=_name(weight) if weight is not None else None,
            bias=_name(bias) if bias is not None else None,
            residual=_name(residual) if residual is not None else None,
            sum=_name(x) if residual is not None and self.keeps_sum else None,
            alpha=self.alpha,
            scale=self.scale,
            correction=self.correction + self.compressed,
            centre_output=self.centre_output,
            x_bias=_name(x_bias) if x_bias is not None else None,
        )


def _name(tensor: Tensor) -> str:
    return _dtype_name(tensor.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    centre: bool,
    compressed: bool,
    eps: float,
    scale: float,
    correction: int,
    alpha: float,
    out_dtype: torch.dtype,
    centre_output: bool,
    statistics: bool,
    keeps_sum: bool,
) -> list[Tensor]:
    """[y, rstd, mean if `centre`, s if there is a residual]: s = x + x_bias + alpha · residual in x's dtype, y the norm
    of s over its last dimension, rstd and mean of each row in float32 (float64 for float64). rstd and mean only if
    `statistics`, s only if `keeps_sum`."""
    form = Form(centre, compressed, eps, scale, correction, alpha, out_dtype, centre_output, statistics, keeps_sum)
    if x.is_cuda:
        spec = form.spec(x, residual, weight, bias, x_bias)
        found = run.forward(spec, x, eps, residual, weight, bias, statistics, wrap=wrap, x_bias=x_bias)
        results = (found.out, found.rstd, found.mean, found.sum)
        return [t for t in results if t is not None]
    s = x if x_bias is None else (x + x_bias).to(x.dtype)
    s = s if residual is None else s + alpha * residual
    out, mean, rstd = normalised(s, weight, bias, form)
    kept = [t.squeeze(-1) for t in (rstd, mean) if t is not None] if statistics else []
    return [out.to(out_dtype), *kept, *([s] if residual is not None and keeps_sum else [])]


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
    mean = wide.mean(-1, keepdim=True) if form.centre else None
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
    centre: bool,
    compressed: bool,
    eps: float,
    scale: float,
    correction: int,
    alpha: float,
    out_dtype: torch.dtype,
    centre_output: bool,
    statistics: bool,
    keeps_sum: bool,
) -> list[Tensor]:
    """[ds, dγ if there is a weight, dβ if there is a bias, Σds if there is an x_bias]; saved: s. Source of the formula:
    ir/ops.py."""
    form = Form(centre, compressed, eps, scale, correction, alpha, out_dtype, centre_output, statistics, keeps_sum)
    if saved.is_cuda:
        spec = form.spec(saved, saved if residual else None, weight, bias, x_bias)
        found = run.backward(spec, grad, saved, rstd, mean, weight, sum_grad, wrap=wrap)
        return [t for t in found if t is not None]
    wide = saved.to(rstd.dtype)
    scales = rstd.unsqueeze(-1)
    normal = (wide - mean.unsqueeze(-1) if mean is not None else wide) * scales
    outer = grad.to(wide.dtype) * scale
    if centre_output:
        outer = outer - outer.mean(-1, keepdim=True)
    inner = outer if weight is None else outer * weight.to(wide.dtype)
    normals = normal + normal.sum(-1, keepdim=True) if compressed else normal
    dx = inner - normals * ((inner * normal).sum(-1, keepdim=True) / (saved.shape[-1] - correction))
    if centre:
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
    x, residual, weight, bias, x_bias, *rest = inputs
    ctx.form = Form(*rest)
    need_statistics(ctx.form.statistics and ctx.form.keeps_sum)
    mean = output[2] if ctx.form.centre else None
    saved = output[-1] if residual is not None else x
    ctx.residual = residual.dtype if residual is not None else None
    ctx.save_for_backward(saved, output[1], mean, weight, bias, x_bias)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    saved, rstd, mean, *vectors = ctx.saved_tensors
    form, residual = ctx.form, ctx.residual
    grad, sum_grad = grads[0], grads[-1] if residual is not None else None
    if grad is None:
        grad = torch.zeros_like(saved, dtype=form.out_dtype)
    op = torch.ops.normfx.norm_backward
    found = list(op(grad, saved, rstd, mean, *vectors, sum_grad, residual is not None, *form))
    ds = found.pop(0)
    vector_grads = [found.pop(0) if vector is not None else None for vector in vectors]
    residual_grad = None
    if residual is not None and ctx.needs_input_grad[1]:
        residual_grad = (ds if form.alpha == 1.0 else ds * form.alpha).to(residual)
    return (ds, residual_grad, *vector_grads, *(None for _ in form))


triton_op("normfx::norm_backward", mutates_args=())(_norm_backward)
triton_op("normfx::norm", mutates_args=())(_norm).register_autograd(_backward, setup_context=_setup)
NORM = torch.ops.normfx.norm.default
