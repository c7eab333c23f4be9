"""The folds of a BatchNorm with running statistics, which is an affine map of each channel: s·(x − mean) + β with
s = γ/sqrt(var + ε) (maths M16).

Bodies of canonical ops (ir/ops.py): products and sums in float32 or better, rounded once. Running statistics have no
gradient, in eager mode neither. γ and β count as rows of numbers, whatever dimensions of size 1 they have: torch takes
a γ of shape (C, 1), and a product with it would broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_scale(var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """s = γ/sqrt(var + ε), in float32 or better."""
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
    """W ⊙ s along dimension 0 or 1 of a linear's or convolution's weight.

    Where the channels of dimension 1 are those of one group, dimension 0 runs over the groups: each block of its
    entries has its own part of s.
    """
    return (_wide(weight) * _spread(scale, weight, dim, groups)).to(dtype)


def _spread(vector: Tensor, weight: Tensor, dim: int, groups: int) -> Tensor:
    """A number for each channel, shaped to broadcast to a weight."""
    ones = [1] * (weight.ndim - 2)
    if dim == 0:
        return vector.reshape(-1, 1, *ones)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    blocks = vector.reshape(groups, 1, columns).expand(groups, rows, columns)
    return blocks.reshape(groups * rows, columns, *ones)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
