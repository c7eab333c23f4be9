"""Weights and biases of layers that read one value, added up.

Bodies of canonical ops (ir/ops.py): products and sums in float64 where the device has it, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfx.ir.centring import exact_dtype
from normfx.ir.channels import laid_out_like


def merge_kernels(weights: list[Tensor], factors: list[float], offsets: list[int], dtype: torch.dtype) -> Tensor:
    """Σ fᵢ·Wᵢ in the kernel of the first one, the largest.

    Shapes: (out, in / groups, *kernel). offsets: for each weight, the place of its first entry along each dimension of
    the kernel; the other entries of that are 0.
    """
    wide = exact_dtype(weights[0])
    total = factors[0] * weights[0].to(wide)
    spatial = total.ndim - 2
    for i, (weight, factor) in enumerate(zip(weights[1:], factors[1:], strict=True), start=1):
        starts = offsets[spatial * i : spatial * (i + 1)]
        margins: list[int] = []
        for dim in reversed(range(spatial)):
            margins += [starts[dim], total.shape[2 + dim] - starts[dim] - weight.shape[2 + dim]]
        total = total + factor * torch.nn.functional.pad(weight.to(wide), margins)
    return laid_out_like(total.to(dtype), weights[0])


def merge_shifts(shifts: list[Tensor], factors: list[float], dtype: torch.dtype) -> Tensor:
    """Σ fᵢ·bᵢ."""
    wide = exact_dtype(shifts[0])
    total = factors[0] * shifts[0].to(wide)
    for shift, factor in zip(shifts[1:], factors[1:], strict=True):
        total = total + factor * shift.to(wide)
    return total.to(dtype)


def diagonal_kernel(like: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """The weight of x ↦ s ⊙ x for each channel, a kernel of one entry; without s, of x itself.

    like: a weight of a layer from these channels to as many, (channels, channels / groups, *kernel)
    """
    channels, columns = like.shape[:2]
    diagonal = torch.eye(columns, dtype=like.dtype, device=like.device).repeat(groups, 1)
    if scale is not None:
        diagonal = diagonal * scale.to(like.dtype).reshape(channels, 1)
    return diagonal.reshape(channels, columns, *[1] * (like.ndim - 2))
