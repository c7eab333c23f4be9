"""Products by packed weights: oneDNN's and MKL's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from normfx.compat.operators import OpOverload


def has_linear() -> bool:
    """Whether this torch was built with oneDNN."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _linear() -> OpOverload:
    """mkldnn::_linear_pointwise(x, weight, bias, post-op, its numbers, its algorithm). Not looked up at import: a torch
    that was built without oneDNN has no such op."""
    op: OpOverload = torch.ops.mkldnn._linear_pointwise.default
    return op


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x times a weight of shape (out, in), packed or as it is, plus a vector. Strides as they come.

    gelu: of that the GELU with erf, in the product's kernel
    """
    result: Tensor = _linear()(x, weight, _dense(bias), *(("gelu", [], "none") if gelu else ("none", [], "")))
    return result


def _dense(bias: Tensor | None) -> Tensor | None:
    """The vector as oneDNN reads it, whatever its strides are: densely."""
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def pack(weight: Tensor, rows: int) -> Tensor:
    """A weight of shape (out, in) in the layout that oneDNN's linear prefers for so many rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


@functools.cache
def _convolution() -> OpOverload:
    """mkldnn::_convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, post-op, its numbers, its
    algorithm)."""
    op: OpOverload = torch.ops.mkldnn._convolution_pointwise.default
    return op


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """A convolution by a packed kernel, stored channels last. x has entries."""
    how = (padding, stride, dilation, groups)
    result: Tensor = _convolution()(x, weight, _dense(bias), *how, "none", [], "")
    return result


def pack_convolution(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, size: list[int] | None
) -> Tensor:
    """A kernel in the layout that oneDNN's convolution prefers for inputs of a size (None: of any)."""
    given = (weight, padding, stride, dilation, groups, size)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(*given)
    return packed


def bytes_of(packed: Tensor) -> int:
    """The bytes of a packed tensor, which the layout may pad."""
    written: int = torch.ops.mkldnn._nbytes(packed)
    return written


def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mkl_pack(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return packed


def mkl_linear(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    out: Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    return out


@contextmanager
def packing_for_onednn() -> Iterator[None]:
    """While a graph is frozen, let Inductor pack float32 linears for oneDNN, not for MKL.

    It asks whether Arm's Compute Library, a backend of oneDNN, is there.
    """
    from torch._inductor.fx_passes import mkldnn_fusion

    mkldnn_fusion._mkldnn_fusion_init()  # asks the same question, once, about something else
    ops: Any = torch.ops.mkldnn
    asked = ops._is_mkldnn_acl_supported
    ops._is_mkldnn_acl_supported = lambda: True
    try:
        yield
    finally:
        ops._is_mkldnn_acl_supported = asked
