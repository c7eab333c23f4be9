"""Two norms with a residual add between them as one op that runs on a generated kernel: `normfx::two_norms`.

    s = norm₁(x) + alpha·residual,  y = norm₂(s)

Its derivative is that of each norm, one after the other (`normfx::norm_backward`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfx.kernels import run
from normfx.kernels.spec import Inner, Spec
from normfx.lower.norm_ops import Form, need_statistics, normalised, triton_op, wrap


class Forms(NamedTuple):
    """The arguments of the op after its tensors, in the order of its schema: of the first norm, then of the second,
    whose alpha is that of the add. No form of the first is compressed, its alpha is 1, its dtype that of x."""

    centre_1: bool
    eps_1: float
    scale_1: float
    correction_1: int
    centre_output_1: bool
    centre: bool
    eps: float
    scale: float
    correction: int
    alpha: float
    out_dtype: torch.dtype
    centre_output: bool
    statistics: bool = True

    def first(self, dtype: torch.dtype) -> Form:
        return Form(self.centre_1, False, self.eps_1, self.scale_1, self.correction_1, 1.0, dtype, self.centre_output_1)

    @property
    def second(self) -> Form:
        own = (self.eps, self.scale, self.correction, self.alpha, self.out_dtype, self.centre_output)
        return Form(self.centre, False, *own)

    def spec(
        self,
        x: Tensor,
        residual: Tensor,
        weight_1: Tensor | None,
        bias_1: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Spec:
        one = self.first(x.dtype).spec(x, None, weight_1, bias_1)
        inner = Inner(one.centre, one.weight, one.bias, one.scale, one.correction, one.centre_output)
        return replace(self.second.spec(x, residual, weight, bias), inner=inner)


def _two_norms(
    x: Tensor,
    residual: Tensor,
    weight_1: Tensor | None,
    bias_1: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centre_1: bool,
    eps_1: float,
    scale_1: float,
    correction_1: int,
    centre_output_1: bool,
    centre: bool,
    eps: float,
    scale: float,
    correction: int,
    alpha: float,
    out_dtype: torch.dtype,
    centre_output: bool,
    statistics: bool,
) -> list[Tensor]:
    """[y, s in x's dtype] and, if `statistics`, [rstd of s, rstd of x, mean of s if `centre`, mean of x if
    `centre_1`]."""
    own = (centre, eps, scale, correction, alpha, out_dtype, centre_output, statistics)
    forms = Forms(centre_1, eps_1, scale_1, correction_1, centre_output_1, *own)
    if x.is_cuda:
        spec = forms.spec(x, residual, weight_1, bias_1, weight, bias)
        inner = (weight_1, bias_1, eps_1)
        found = run.forward(spec, x, eps, residual, weight, bias, statistics, wrap=wrap, inner=inner)
        results = (found.out, found.sum, found.rstd, found.inner_rstd, found.mean, found.inner_mean)
        return [t for t in results if t is not None]
    first, mean_1, rstd_1 = normalised(x, weight_1, bias_1, forms.first(x.dtype))
    s = (first + alpha * residual).to(x.dtype)
    out, mean, rstd = normalised(s, weight, bias, forms.second)
    kept = [t.squeeze(-1) for t in (rstd, rstd_1, mean, mean_1) if t is not None] if statistics else []
    return [out.to(out_dtype), s, *kept]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, *vectors = inputs[:6]
    ctx.forms, ctx.residual = Forms(*inputs[6:]), residual.dtype
    need_statistics(ctx.forms.statistics)
    means = output[4:]
    mean = means.pop(0) if ctx.forms.centre else None
    mean_1 = means.pop(0) if ctx.forms.centre_1 else None
    ctx.save_for_backward(x, output[1], output[2], mean, output[3], mean_1, *vectors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, s, rstd, mean, rstd_1, mean_1, weight_1, bias_1, weight, bias = ctx.saved_tensors
    forms = ctx.forms
    grad = torch.zeros_like(s, dtype=forms.out_dtype) if grads[0] is None else grads[0]
    op = torch.ops.normfx.norm_backward
    second = list(op(grad, s, rstd, mean, weight, bias, None, grads[1], True, *forms.second))
    ds = second.pop(0)
    first = list(op(ds, x, rstd_1, mean_1, weight_1, bias_1, None, None, False, *forms.first(x.dtype)))
    dx = first.pop(0)
    vectors = [
        part.pop(0) if vector is not None else None
        for vector, part in ((weight_1, first), (bias_1, first), (weight, second), (bias, second))
    ]
    residual_grad = (ds if forms.alpha == 1.0 else ds * forms.alpha).to(ctx.residual)
    return (dx, residual_grad, *vectors, *(None for _ in forms))


triton_op("normfx::two_norms", mutates_args=())(_two_norms).register_autograd(_backward, setup_context=_setup)
TWO_NORMS = torch.ops.normfx.two_norms.default
