"""Folds of an affine map of each channel into the weight and bias of a linear or convolution.

Of a BatchNorm with running statistics, which is s·(x − mean) + β with s = γ/sqrt(var + ε) (maths M16), and of a norm's
γ and β over the channels that a convolution reads (M7), and of another linear.

Bodies of canonical ops (ir/ops.py): in float64 where the device has it, rounded once (docs/design-notes.md, "Folds of
channels"); products of matrices in float32 or better. Running statistics have no gradient, in eager mode neither. γ and
β count as rows of numbers, whatever dimensions of size 1 they have: torch takes a γ of shape (C, 1), which would
broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfx.ir.centring import exact_dtype


def channel_scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """s = γ/sqrt(var + ε), in float64: it is rounded when a weight is multiplied by it."""
    scale = torch.rsqrt(_wide(var.detach()).flatten() + eps)
    return scale if weight is None else scale * _wide(weight).flatten()


def channel_shift(
    mean: Tensor, scale: Tensor, bias: Tensor | None, before: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """s·(b − mean) + β: the bias after the map, of what had the bias b before it."""
    centre = _wide(mean.detach()).flatten()
    shift = (-centre if before is None else _wide(before) - centre) * scale
    return (shift if bias is None else shift + _wide(bias).flatten()).to(dtype)


def scale_channels(weight: Tensor, scale: Tensor, dim: int, groups: int, dtype: torch.dtype) -> Tensor:
    """W ⊙ s along dimension 0 or 1 of a linear's or convolution's weight; s may be one number.

    Where the channels of dimension 1 are those of one group, dimension 0 runs over the groups: each block of its
    entries has its own part of s.
    """
    return (_wide(weight) * _spread(scale, weight, dim, groups)).to(dtype)


def input_shift(
    weight: Tensor, shift: Tensor, bias: Tensor | None, factor: float, groups: int, dtype: torch.dtype
) -> Tensor:
    """c + k·Σ W ⊙ β over the input channels of each group and all places: what a convolution without padding makes of
    the bias c and of rows k·β."""
    total = (_wide(weight) * _spread(_wide(shift), weight, 1, groups)).flatten(1).sum(1)
    total = total if factor == 1.0 else total * factor
    return (total if bias is None else _wide(bias) + total).to(dtype)


def merge_weights(outer: Tensor, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """W₂W₁ over the channels between: the weight of one linear after the other, or of a convolution W₁ before one whose
    kernel is a single entry."""
    # not in float64: some devices multiply matrices of that very slowly, and live folds do so in each call
    wide = torch.float64 if torch.float64 in (outer.dtype, inner.dtype) else torch.float32
    columns = inner.to(wide).flatten(1)
    product = (outer.to(wide).flatten(1) @ columns).reshape(outer.shape[0], *inner.shape[1:])
    return laid_out_like(product.to(dtype), inner)


def laid_out_like(weight: Tensor, like: Tensor) -> Tensor:
    """A weight, stored channels last where `like` is, else row by row: a convolution stores its result likewise."""
    for rank, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.ndim == rank and like.is_contiguous(memory_format=last) and not like.is_contiguous():
            return weight.contiguous(memory_format=last)
    return weight.contiguous()


def _spread(vector: Tensor, weight: Tensor, dim: int, groups: int) -> Tensor:
    """A number for each channel, or one for all, shaped to broadcast to a weight."""
    ones = [1] * (weight.ndim - 2)
    if dim == 0 or vector.numel() == 1:
        return vector.reshape(-1, 1, *ones)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    blocks = vector.reshape(groups, 1, columns).expand(groups, rows, columns)
    return blocks.reshape(groups * rows, columns, *ones)


def _wide(x: Tensor) -> Tensor:
    return x.to(exact_dtype(x))
