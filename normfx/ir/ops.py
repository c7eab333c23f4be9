"""Canonical ops. The body below *is* the meaning of each op: on every device, in every test, under autograd.

Each is a composite of ATen ops, so autograd works on it and Inductor sees (and fuses) the spelled form.
Statistics and folds are computed in float32 or better whatever autocast says (no op used here is on autocast's
lower-precision list) and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("normfx", "DEF")  # type: ignore[no-untyped-call]

_NORM_ARGS = (
    "(Tensor x, Tensor? weight, Tensor? bias, int dim, float eps, str eps_place, int correction, float scale, "
    "ScalarType compute_dtype, ScalarType out_dtype) -> Tensor"
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for narrower floats, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """float64 where either is, else float32."""
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int,
    eps: float,
    eps_place: str,
    correction: int,
    scale: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """k·(weight ⊙ x·rstd + bias), rstd = 1/sqrt(Σx²/(d − correction) + ε) along `dim` ("Root Mean Square Layer
    Normalization", eq. 4, with a bias).

    weight, bias: d entries (any size-1 dimensions around them) or one entry. eps_place "outside" means
    rstd = 1/(sqrt(Σx²/(d − correction)) + ε).
    """
    return _normalise(x.to(compute_dtype), x, weight, bias, dim, eps, eps_place, correction, scale, out_dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int,
    eps: float,
    eps_place: str,
    correction: int,
    scale: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """rms_norm of x − mean(x): LayerNorm in two passes over a row (one fused loop under Inductor on CPU)."""
    wide = x.to(compute_dtype)
    wide = wide - wide.mean(dim, keepdim=True)
    return _normalise(wide, x, weight, bias, dim, eps, eps_place, correction, scale, out_dtype)


def _normalise(
    wide: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dim: int,
    eps: float,
    eps_place: str,
    correction: int,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    d = x.shape[dim]
    mean_square = (wide * wide).mean(dim, keepdim=True)
    if correction:
        mean_square = mean_square * (d / (d - correction))
    if eps_place == "outside":
        rstd = (mean_square.sqrt() + eps).reciprocal()
    else:
        rstd = torch.rsqrt(mean_square + eps)
    if scale != 1.0:
        rstd = rstd * scale
    out = wide * rstd
    if weight is not None:
        out = out * _along(weight, x.ndim, dim).to(wide.dtype)
    if bias is not None:
        shift = _along(bias, x.ndim, dim).to(wide.dtype)
        out = out + (shift * scale if scale != 1.0 else shift)
    return out.to(out_dtype)


class _Normalise(torch.autograd.Function):
    """rms_norm or layer_norm with the derivative written out: from x and two numbers a row, in one pass over rows and
    one over columns. Autograd's own derivative of the body reads the rows more often.

        x̂ = (x − μ)·rstd,  t = γ ⊙ k·dy,  dx = rstd·(t − mean t − x̂·d/(d − c)·mean(t x̂)),  dγ = Σ k·dy ⊙ x̂,  dβ = Σ k·dy

    without the means of x and t for an RMSNorm. Source: "Layer Normalization" (Ba et al. 2016), differentiated. The
    result is not differentiable again, as nothing is that AOTAutograd compiled.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centre: bool,
        dim: int,
        eps: float,
        correction: int,
        scale: float,
        compute_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(compute_dtype)
        mean = wide.mean(dim, keepdim=True) if centre else wide.new_zeros(())
        if centre:
            wide = wide - mean
        mean_square = (wide * wide).mean(dim, keepdim=True)
        if correction:
            mean_square = mean_square * (x.shape[dim] / (x.shape[dim] - correction))
        rstd = torch.rsqrt(mean_square + eps)
        out = wide * (rstd * scale if scale != 1.0 else rstd)
        if weight is not None:
            out = out * _along(weight, x.ndim, dim).to(compute_dtype)
        if bias is not None:
            shift = _along(bias, x.ndim, dim).to(compute_dtype)
            out = out + (shift * scale if scale != 1.0 else shift)
        return out.to(out_dtype), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, *ctx.settings = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 10
        x, weight, bias, mean, rstd = ctx.saved_tensors
        centre, dim, _, correction, scale, compute_dtype, _ = ctx.settings
        normal = (x.to(compute_dtype) - mean if centre else x.to(compute_dtype)) * rstd
        wide = grad.to(compute_dtype)
        if scale != 1.0:
            wide = wide * scale
        inner = wide if weight is None else wide * _along(weight, x.ndim, dim).to(compute_dtype)
        projection = (inner * normal).mean(dim, keepdim=True)
        if correction:
            projection = projection * (x.shape[dim] / (x.shape[dim] - correction))
        dx = inner - normal * projection
        if centre:
            dx = dx - inner.mean(dim, keepdim=True)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            (dx * rstd).to(x.dtype) if needs_x else None,
            _summed(wide * normal, weight, dim) if needs_weight else None,
            _summed(wide, bias, dim) if needs_bias else None,
            *(None,) * 7,
        )


def _summed(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """The gradient of a vector along `dim`, or of one number: summed over everything else."""
    if like.numel() == 1 and rows.shape[dim] != 1:
        return rows.sum().reshape(like.shape).to(like.dtype)
    others = [d for d in range(rows.ndim) if d != dim % rows.ndim]
    return (rows.sum(others) if others else rows).reshape(like.shape).to(like.dtype)


def _differentiable(body: Callable[..., Tensor], centre: bool) -> Callable[..., Tensor]:
    """The body where no gradient is recorded or functorch acts, else the same with its derivative written out."""

    def run(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dim: int,
        eps: float,
        eps_place: str,
        correction: int,
        scale: float,
        compute_dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        if not wanted or eps_place != "inside" or torch._C._are_functorch_transforms_active():
            return body(x, weight, bias, dim, eps, eps_place, correction, scale, compute_dtype, out_dtype)
        settings = (centre, dim, eps, correction, scale, compute_dtype, out_dtype)
        out: Tensor = _Normalise.apply(x, weight, bias, *settings)[0]  # type: ignore[no-untyped-call]
        return out

    return run


def _along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    """A vector of d entries (or one) shaped to broadcast along `dim` of a value with ndim dimensions."""
    trailing = ndim - 1 - dim % ndim
    return vector.reshape([-1] + [1] * trailing)


def center(x: Tensor, dim: int, size: int, inner: int, dtype: torch.dtype) -> Tensor:
    """P x along a feature axis, as `dtype`: x minus its mean over the middle of `dim` seen as (outer, size, inner).

    A value that is constant along the axis (one entry in `dim`) has the centred form 0.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    n = x.shape[dim]
    if n == size or n == 1:
        return (wide - wide.mean(dim, keepdim=True)).to(dtype)
    dim = dim % x.ndim
    blocks = (*x.shape[:dim], n // (size * inner), size, inner, *x.shape[dim + 1 :])
    split = wide.reshape(blocks)
    return (split - split.mean(dim + 1, keepdim=True)).reshape(x.shape).to(dtype)


def scale_features(weight: Tensor, gamma: Tensor, dim: int, size: int, inner: int, dtype: torch.dtype) -> Tensor:
    """W · diag(γ), as `dtype`: γ multiplies the middle of the weight's `dim` seen as (outer, size, inner)."""
    wide = _wider(weight.dtype, gamma.dtype)
    factors = _tile(gamma.to(wide), weight.shape[dim], size, inner)
    return (weight.to(wide) * _along(factors, weight.ndim, dim)).to(dtype)


def fold_shift(
    weight: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    factor: float,
    dim: int,
    size: int,
    inner: int,
    dtype: torch.dtype,
) -> Tensor:
    """c + k·Wβ for a two-dimensional weight with input features along `dim`: the bias that takes over a norm's β (M7).

    Written as a product and a sum, not as a matrix product: autocast would run that one in low precision.
    """
    wide = _wider(weight.dtype, beta.dtype)
    terms = _tile(beta.to(wide), weight.shape[dim], size, inner)
    shift = (weight.to(wide) * _along(terms, weight.ndim, dim)).sum(dim)
    if factor != 1.0:
        shift = shift * factor
    if bias is not None:
        shift = bias.to(wide) + shift
    return shift.to(dtype)


def _tile(vector: Tensor, n: int, size: int, inner: int) -> Tensor:
    """γ of `size` entries (or one) → n = outer·size·inner entries, index (o, k, i) → γ[k]."""
    flat = vector.reshape(-1)
    if flat.shape[0] == 1 or n == size:
        return flat
    return flat.reshape(1, size, 1).expand(n // (size * inner), size, inner).reshape(n)


def _define(schema: str, body: object) -> None:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, body, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


_define("rms_norm" + _NORM_ARGS, _differentiable(rms_norm, centre=False))
_define("layer_norm" + _NORM_ARGS, _differentiable(layer_norm, centre=True))
_define("center(Tensor x, int dim, int size, int inner, ScalarType dtype) -> Tensor", center)
_define(
    "scale_features(Tensor weight, Tensor gamma, int dim, int size, int inner, ScalarType dtype) -> Tensor",
    scale_features,
)
_define(
    "fold_shift(Tensor weight, Tensor beta, Tensor? bias, float factor, int dim, int size, int inner, "
    "ScalarType dtype) -> Tensor",
    fold_shift,
)

RMS_NORM = torch.ops.normfx.rms_norm.default
LAYER_NORM = torch.ops.normfx.layer_norm.default
CENTER = torch.ops.normfx.center.default
SCALE_FEATURES = torch.ops.normfx.scale_features.default
FOLD_SHIFT = torch.ops.normfx.fold_shift.default
BODIES = {
    RMS_NORM: rms_norm,
    LAYER_NORM: layer_norm,
    CENTER: center,
    SCALE_FEATURES: scale_features,
    FOLD_SHIFT: fold_shift,
}
"""Each canonical op and its body."""
