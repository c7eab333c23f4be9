"""Canonical ops. The body below *is* the meaning of each op: on every device, in every test, under autograd.

Each is a composite of ATen ops, so autograd works on it and Inductor sees (and fuses) the spelled form.
Statistics and folds are computed in float32 or better whatever autocast says (no op used here is on autocast's
lower-precision list) and rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from normfx.compat.operators import OpOverload
from normfx.compat.tracing import functorch_is_active
from normfx.ir.centring import accumulation_dtype, center, center_block, centred
from normfx.ir.channels import channel_scale, channel_shift, input_shift, merge_weights, scale_channels
from normfx.ir.form import EpsPlace, Form, Kind, schema
from normfx.ir.merging import diagonal_kernel, merge_kernels, merge_shifts


def _wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """float64 where either is, else float32."""
    return torch.float64 if torch.float64 in (a, b) else torch.float32


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> Tensor:
    """k·(weight ⊙ (x − μ)·rstd + bias), rstd = 1/sqrt(Σ(x − μ)²/(d − c) + ε) along one dimension, in the form's kind:

    rms_norm:   μ = 0 ("Root Mean Square Layer Normalization", eq. 4, with a bias)
    layer_norm: μ = mean(x), in two passes over a row (one fused loop under Inductor on CPU)
    crms_norm:  of rows of which one entry, −Σx, is not stored: rstd = 1/sqrt((Σx² + (Σx)²)/(d − c) + ε)

    weight, bias: d entries (any size-1 dimensions around them) or one entry. `form` has the rest: ir/form.py.
    """
    return _normalise(x, weight, bias, form)[0]


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm, the mean of each row (if it is subtracted) and rstd."""
    dim, k = form.dim, form.scale
    wide, mean, rstd = _statistics(x, form)
    factor = rstd * k if k != 1.0 else rstd
    out = wide * factor
    if weight is not None:
        gamma = _along(weight, x.ndim, dim).to(wide.dtype)
        out = out * gamma
    if form.centre_output:  # γ·x/d in the pass over the row that sums its squares
        products = wide if weight is None else wide * gamma
        out = out - products.mean(dim, keepdim=True) * factor
    if bias is not None:
        shift = _along(bias, x.ndim, dim).to(wide.dtype)
        shift = shift * k if k != 1.0 else shift
        out = out + (centred(shift, 0) if form.centre_output else shift)
    return out.to(form.out_dtype), mean, rstd


def _statistics(x: Tensor, form: Form) -> tuple[Tensor, Tensor | None, Tensor]:
    """The row without its mean (if that is subtracted), the mean, and rstd."""
    dim = form.dim
    wide, mean = x.to(form.compute_dtype), None
    if form.centres:
        mean = wide.mean(dim, keepdim=True)
        wide = wide - mean
    mean_square = (wide * wide).mean(dim, keepdim=True)
    if form.compressed:
        mean_square = mean_square + wide.mean(dim, keepdim=True).square() * x.shape[dim]
    if form.correction:
        mean_square = mean_square * _unbiased(x, form)
    if form.eps_place == "outside":
        rstd = (mean_square.sqrt() + form.eps).reciprocal()
    elif form.eps_place == "clamped":
        rstd = torch.rsqrt(mean_square.clamp_min(form.eps))
    else:
        rstd = torch.rsqrt(mean_square + form.eps)
    return wide, mean, rstd


def row_factor(
    x: Tensor, kind: Kind, dim: int, eps: float, eps_place: EpsPlace, correction: int, compute_dtype: torch.dtype
) -> Tensor:
    """rstd of each row, as a norm of this form computes it, with size 1 in `dim` (maths M8)."""
    return _statistics(x, Form(kind, dim, eps, eps_place, correction, 1.0, compute_dtype, compute_dtype))[2]


def scale_rows(product: Tensor, factor: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """factor ⊙ product + shift, as `dtype`: a deferred norm after the product of its input (maths M8)."""
    out = product.to(factor.dtype) * factor
    return (out if shift is None else out + shift.to(factor.dtype)).to(dtype)


def _unbiased(x: Tensor, form: Form) -> float:
    """d / (d − c)."""
    d = x.shape[form.dim]
    return d / (d - form.correction)


class _Normalise(torch.autograd.Function):
    """A norm with ε inside the root and the derivative written out: from x and two numbers a row, in one pass over rows
    and one over columns. Autograd's own derivative of the body reads the rows more often.

        x̂ = (x − μ)·rstd,  t = γ ⊙ k·dy,  dx = rstd·(t − mean t − x̂·d/(d − c)·mean(t x̂)),  dγ = Σ k·dy ⊙ x̂,  dβ = Σ k·dy

    without the means of x and t for an RMSNorm; in a CRMSNorm dx has x̂ + Σx̂ instead of x̂; with a centred output P dy
    instead of dy. Source: "Layer
    Normalization" (Ba et al. 2016), differentiated.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return _normalise(x, weight, bias, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.form = inputs
        statistics = output[1:]
        ctx.save_for_backward(*tensors, *statistics)
        ctx.mark_non_differentiable(*(t for t in statistics if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad, form = grads[0], ctx.form
        if grad is None:
            return (None,) * 4
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # this derivative is to be differentiated: the statistics depend on x
            _, mean, rstd = _normalise(x, None, None, form)
        wide, dim = x.to(form.compute_dtype), form.dim
        normal = (wide - mean if form.centres else wide) * rstd
        outer = grad.to(form.compute_dtype)
        if form.scale != 1.0:
            outer = outer * form.scale
        if form.centre_output:
            outer = outer - outer.mean(dim, keepdim=True)
        inner = outer if weight is None else outer * _along(weight, x.ndim, dim).to(form.compute_dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight_grad = _summed(outer * normal, weight, dim) if needs_weight else None
        projection = (inner * normal).mean(dim, keepdim=True)
        if form.correction:
            projection = projection * _unbiased(x, form)
        if form.compressed:
            normal = normal + normal.sum(dim, keepdim=True)
        dx = inner - normal * projection
        if form.centres:
            dx = dx - inner.mean(dim, keepdim=True)
        return (
            (dx * rstd).to(x.dtype) if needs_x else None,
            weight_grad,
            _summed(outer, bias, dim) if needs_bias else None,
            None,
        )


def _summed(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """The gradient of a vector along `dim`, or of one number: summed over everything else."""
    if like.numel() == 1 and rows.shape[dim] != 1:
        return rows.sum().reshape(like.shape).to(like.dtype)
    others = [d for d in range(rows.ndim) if d != dim % rows.ndim]
    return (rows.sum(others) if others else rows).reshape(like.shape).to(like.dtype)


_differentiated: Callable[..., tuple[Tensor, ...]] = _Normalise.apply


def differentiated_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> Tensor:
    """`norm`; where gradients are recorded, and functorch does not act, with its derivative written out."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    plain = not wanted or form.eps_place != "inside" or functorch_is_active()
    return (_normalise if plain else _differentiated)(x, weight, bias, form)[0]


def _along(vector: Tensor, ndim: int, dim: int) -> Tensor:
    """A vector of d entries (or one) shaped to broadcast along `dim` of a value with ndim dimensions."""
    trailing = ndim - 1 - dim % ndim
    return vector.reshape([-1] + [1] * trailing)


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
    """c + k·Wβ for a weight with input features along `dim`: the bias that takes over a norm's β (M7). Of a matrix, a
    vector; of a stack of matrices (E, d, h), as batched products read it, a row for each (E, 1, h).

    Written as a product and a sum, not as a matrix product: autocast would run that one in low precision.
    """
    wide = _wider(weight.dtype, beta.dtype)
    terms = _tile(beta.to(wide), weight.shape[dim], size, inner)
    shift = (weight.to(wide) * _along(terms, weight.ndim, dim)).sum(dim, keepdim=weight.ndim > 2)
    if factor != 1.0:
        shift = shift * factor
    if bias is not None:
        shift = bias.to(wide) + shift
    return shift.to(dtype)


def compress(x: Tensor, dim: int, basis: str, channel: int, width: int, dtype: torch.dtype) -> Tensor:
    """P x along `dim` in d − 1 entries, followed by zeros up to `width`, as `dtype`.

    basis "drop": c = P x without entry p = channel, which is −Σ of the others (Jiang et al. 2023, section 3.2)
    "orthonormal": Qᵀx with the columns i ≠ p of H = I − w wᵀ/(1 − 1/√d), w = 1/√d − e_p, the reflection of Householder
    (1958) that takes 1/√d to e_p: cᵢ + cₚ/(√d − 1). Q has orthonormal columns, and 1ᵀQ = 0
    """
    wide = x.to(accumulation_dtype(x.dtype))
    kept, dropped = _without(centred(wide, dim), dim, channel)
    if basis == "orthonormal":
        kept = kept + dropped / (math.sqrt(x.shape[dim]) - 1)
    return _padded(kept, dim, width).to(dtype)


def compress_input(weight: Tensor, dim: int, basis: str, channel: int, width: int, dtype: torch.dtype) -> Tensor:
    """W of a linear, its input features along `dim`, for input that `compress` has made: W x = W' compress(x) for all x
    with Σx = 0. basis "drop": Wᵢ − Wₚ; "orthonormal": W Q, that is Wᵢ + Wₚ/√d − Σ_{j ≠ p} Wⱼ/(d − √d)."""
    wide, d = weight.to(accumulation_dtype(weight.dtype)), weight.shape[dim]
    kept, dropped = _without(wide, dim, channel)
    if basis == "orthonormal":
        kept = kept + dropped / math.sqrt(d) - kept.sum(dim, keepdim=True) / (d - math.sqrt(d))
    else:
        kept = kept - dropped
    return _padded(kept, dim, width).to(dtype)


def _without(x: Tensor, dim: int, channel: int) -> tuple[Tensor, Tensor]:
    """The other entries along `dim`, in order, and the channel's."""
    after = x.shape[dim] - channel - 1
    kept = x.narrow(dim, 0, channel)
    if after:
        kept = torch.cat([kept, x.narrow(dim, channel + 1, after)], dim)
    return kept, x.narrow(dim, channel, 1)


def _padded(x: Tensor, dim: int, width: int) -> Tensor:
    missing = width - x.shape[dim]
    if not missing:
        return x
    following = [0, 0] * (x.ndim - 1 - dim % x.ndim)
    return torch.nn.functional.pad(x, [*following, 0, missing])


def _tile(vector: Tensor, n: int, size: int, inner: int) -> Tensor:
    """γ of `size` entries (or one) → n = outer·size·inner entries, index (o, k, i) → γ[k]."""
    flat = vector.reshape(-1)
    if flat.shape[0] == 1 or n == size:
        return flat
    return flat.reshape(1, size, 1).expand(n // (size * inner), size, inner).reshape(n)


def define(
    call: str,
    body: Callable[..., object],
    runs: str = "CompositeImplicitAutograd",
    tags: tuple[torch.Tag, ...] = (),
) -> OpOverload:
    """The op of a schema (`call`), in the namespace normfx. runs: the dispatch key or device that `body` is for."""
    name, arguments = call[: call.index("(")], call[call.index("(") :]
    library.define(f"normfx::{name}", arguments, tags=(torch.Tag.pt2_compliant_tag, *tags))
    library.impl(f"normfx::{name}", runs, body)
    op: OpOverload = getattr(torch.ops.normfx, name).default
    return op


def _of_kind(kind: Kind, body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The body as the op of a kind calls it, with the form field by field."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, *fields: Any) -> Tensor:
        return body(x, weight, bias, Form(kind, *fields))

    return run


def _define_norm(kind: Kind) -> OpOverload:
    return define(
        f"{kind}(Tensor x, Tensor? weight, Tensor? bias, {schema()}=False) -> Tensor",
        _of_kind(kind, differentiated_norm),
    )


_KINDS: tuple[Kind, ...] = ("rms_norm", "layer_norm", "crms_norm")
NORMS = {kind: _define_norm(kind) for kind in _KINDS}
"""The op of each kind of norm."""
RMS_NORM, LAYER_NORM, CRMS_NORM = (NORMS[kind] for kind in _KINDS)
CENTER = define("center(Tensor x, int dim, int size, int inner, ScalarType dtype) -> Tensor", center)
CENTER_BLOCK = define(
    "center_block(Tensor x, int dim, int period, int first, int end, int size, int inner, ScalarType dtype) -> Tensor",
    center_block,
)
SCALE_FEATURES = define(
    "scale_features(Tensor weight, Tensor gamma, int dim, int size, int inner, ScalarType dtype) -> Tensor",
    scale_features,
)
FOLD_SHIFT = define(
    "fold_shift(Tensor weight, Tensor beta, Tensor? bias, float factor, int dim, int size, int inner, "
    "ScalarType dtype) -> Tensor",
    fold_shift,
)
_BASIS_ARGS = "int dim, str basis, int channel, int width, ScalarType dtype) -> Tensor"
COMPRESS = define(f"compress(Tensor x, {_BASIS_ARGS}", compress)
COMPRESS_INPUT = define(f"compress_input(Tensor weight, {_BASIS_ARGS}", compress_input)
CHANNEL_SCALE = define("channel_scale(Tensor var, Tensor? weight, float eps) -> Tensor", channel_scale)
CHANNEL_SHIFT = define(
    "channel_shift(Tensor mean, Tensor scale, Tensor? bias, Tensor? before, ScalarType dtype) -> Tensor", channel_shift
)
SCALE_CHANNELS = define(
    "scale_channels(Tensor weight, Tensor scale, int dim, int groups, ScalarType dtype) -> Tensor", scale_channels
)
INPUT_SHIFT = define(
    "input_shift(Tensor weight, Tensor shift, Tensor? bias, float factor, int groups, ScalarType dtype) -> Tensor",
    input_shift,
)
MERGE_WEIGHTS = define("merge_weights(Tensor outer, Tensor inner, ScalarType dtype) -> Tensor", merge_weights)
MERGE_KERNELS = define(
    "merge_kernels(Tensor[] weights, float[] factors, int[] offsets, ScalarType dtype) -> Tensor", merge_kernels
)
MERGE_SHIFTS = define("merge_shifts(Tensor[] shifts, float[] factors, ScalarType dtype) -> Tensor", merge_shifts)
DIAGONAL_KERNEL = define("diagonal_kernel(Tensor like, Tensor? scale, int groups) -> Tensor", diagonal_kernel)
ROW_FACTOR = define(
    "row_factor(Tensor x, str kind, int dim, float eps, str eps_place, int correction, ScalarType compute_dtype) "
    "-> Tensor",
    row_factor,
)
SCALE_ROWS = define("scale_rows(Tensor product, Tensor factor, Tensor? shift, ScalarType dtype) -> Tensor", scale_rows)
CHANNEL_FOLDS = {
    CHANNEL_SCALE: channel_scale,
    CHANNEL_SHIFT: channel_shift,
    SCALE_CHANNELS: scale_channels,
    INPUT_SHIFT: input_shift,
}
"""Those of an affine map of channels, and their bodies."""
BRANCH_FOLDS = {MERGE_KERNELS: merge_kernels, MERGE_SHIFTS: merge_shifts, DIAGONAL_KERNEL: diagonal_kernel}
"""Those of layers that read one value, and their bodies."""
_OF_FEATURES = frozenset({CENTER, CENTER_BLOCK, SCALE_FEATURES, FOLD_SHIFT, COMPRESS, COMPRESS_INPUT})
FOLDS = _OF_FEATURES | {MERGE_WEIGHTS, *CHANNEL_FOLDS, *BRANCH_FOLDS}
"""Ops that make folded weights, or the centred copies of activations."""
BODIES = {
    **{op: _of_kind(kind, norm) for kind, op in NORMS.items()},
    CENTER: center,
    CENTER_BLOCK: center_block,
    SCALE_FEATURES: scale_features,
    FOLD_SHIFT: fold_shift,
    COMPRESS: compress,
    COMPRESS_INPUT: compress_input,
    MERGE_WEIGHTS: merge_weights,
    ROW_FACTOR: row_factor,
    SCALE_ROWS: scale_rows,
    **CHANNEL_FOLDS,
    **BRANCH_FOLDS,
}
"""Each canonical op and its body."""
