"""Canonical ops. The body below *is* the meaning of each op: on every device, in every test, under autograd.

Each is a composite of ATen ops, so autograd differentiates it and Inductor sees (and fuses) the spelled form.
Statistics and folds are computed in float32 or better whatever autocast says (no op used here is on autocast's
lower-precision list) and rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


_define("rms_norm" + _NORM_ARGS, rms_norm)
_define("layer_norm" + _NORM_ARGS, layer_norm)
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
