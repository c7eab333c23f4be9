"""Centring: x minus its mean over the features, of weights and of values (maths M1, M2, M4)."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for narrower floats, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def exact_dtype(weight: Tensor) -> torch.dtype:
    """What a fold of weights is computed in before it is rounded: float64, where every device of its kind has that."""
    has = weight.device.type in ("cpu", "cuda", "meta") or weight.dtype == torch.float64
    return torch.float64 if has else torch.float32


def center(x: Tensor, dim: int, size: int, inner: int, dtype: torch.dtype) -> Tensor:
    """P x along a feature axis, as `dtype`: x minus its mean over the middle of `dim` seen as (outer, size, inner).

    A value that is constant along the axis (one entry in `dim`) has the centred form 0.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    n = x.shape[dim]
    if n == 1:
        return (wide - wide.mean(dim, keepdim=True)).to(dtype)
    if n == size:
        return centred(wide, dim).to(dtype)
    dim = dim % x.ndim
    blocks = (*x.shape[:dim], n // (size * inner), size, inner, *x.shape[dim + 1 :])
    return centred(wide.reshape(blocks), dim + 1).reshape(x.shape).to(dtype)


def center_block(
    x: Tensor, dim: int, period: int, first: int, end: int, size: int, inner: int, dtype: torch.dtype
) -> Tensor:
    """P x for the entries from `first` to `end` of each run of `period` entries of `dim`, and x for the others.

    dim: not negative; dtype: of the result; size, inner: of the feature axis, as in `center`
    """
    wide = x.to(accumulation_dtype(x.dtype))
    runs = wide.reshape(*x.shape[:dim], x.shape[dim] // period, period, *x.shape[dim + 1 :])
    sizes = [first, end - first, period - end]
    before, block, after = torch.split(runs, sizes, dim + 1)
    block = center(block, dim + 1, size, inner, wide.dtype)
    return torch.cat([before, block, after], dim + 1).reshape(x.shape).to(dtype)


def centred(x: Tensor, dim: int) -> Tensor:
    """P x along a whole dimension, in two passes: the mean that rounding left is subtracted too.

    The computed mean of n equal entries is not that entry: it is off by up to its rounding error u|x|. A row without
    variance would keep this as its only content, and a norm divides it by √ε. The second pass leaves u²|x|. What it
    subtracts is 0 in exact arithmetic and so is its derivative.
    """
    once = x - x.mean(dim, keepdim=True)
    return once - once.detach().mean(dim, keepdim=True)
