"""Tensors → launches of generated kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .build import build
from .launch import backward_launch, forward_launch, parts, programs, sum_rows
from .source import SUM_COLUMNS, Source, backward_source, column_source, finalise_source, forward_source
from .spec import Spec

_source_of_forward = functools.cache(forward_source)
_source_of_backward = functools.cache(backward_source)
_source_of_columns = functools.cache(column_source)
_source_of_sum = functools.cache(finalise_source)

INTERPRETED = 4
"""Multiprocessors of a CPU under Triton's interpreter."""


Wrap = Callable[[Any], Any]
"""What a kernel goes through before it is launched; torch's `wrap_triton` lets a compiler see the launch."""


def _as_it_is(kernel: Any) -> Any:
    return kernel


class Forward(NamedTuple):
    """out; sum: None unless the spec stores it; mean, rstd: float32, one a row, None where they are not kept; those of
    the inner norm likewise."""

    out: Tensor
    sum: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    inner_mean: Tensor | None = None
    inner_rstd: Tensor | None = None


class Backward(NamedTuple):
    """x is the gradient of x and, times alpha, of the residual; x_bias its sum over rows."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    x_bias: Tensor | None = None


def forward(
    spec: Spec,
    x: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    statistics: bool = True,
    wrap: Wrap = _as_it_is,
    inner: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0),
    x_bias: Tensor | None = None,
) -> Forward:
    """The norm over the last dimension of x, of spec.entries entries; any number of other dimensions.

    inner: weight, bias and ε of the spec's inner norm
    """
    shape, matrix = x.shape, _rows(x, spec)
    rows = matrix.shape[0]
    out = x.new_empty(shape, dtype=getattr(torch, spec.out))
    total = x.new_empty(shape, dtype=getattr(torch, spec.sum)) if spec.sum else None
    rstd = x.new_empty(shape[:-1], dtype=torch.float32) if statistics else None
    mean = torch.empty_like(rstd) if rstd is not None and spec.centre else None
    launch = forward_launch(spec)
    tensors = {
        "x": matrix,
        "residual": _maybe_rows(residual, spec),
        "x_bias": _vector(x_bias),
        "weight": _vector(weight),
        "bias": _vector(bias),
        "out": _rows(out, spec),
        "sum": _maybe_rows(total, spec),
        "mean": mean,
        "rstd": rstd,
    }
    inner_weight, inner_bias, inner_eps = inner
    inner_rstd = torch.empty_like(rstd) if rstd is not None and spec.inner is not None else None
    inner_mean = torch.empty_like(rstd) if rstd is not None and spec.inner is not None and spec.inner.centre else None
    tensors |= {
        "inner_weight": _vector(inner_weight),
        "inner_bias": _vector(inner_bias),
        "inner_mean": inner_mean,
        "inner_rstd": inner_rstd,
    }
    if rows:
        grid = (programs(launch, rows, processors(x.device)),)
        source = _source_of_forward(spec, launch, statistics)
        _start(wrap, source, grid, tensors, rows=rows, eps=eps, inner_eps=inner_eps)
    return Forward(out, total, mean, rstd, inner_mean, inner_rstd)


def backward(
    spec: Spec,
    out_grad: Tensor,
    saved: Tensor,
    rstd: Tensor,
    mean: Tensor | None = None,
    weight: Tensor | None = None,
    sum_grad: Tensor | None = None,
    wrap: Wrap = _as_it_is,
) -> Backward:
    """Gradients from what forward kept. saved: the sum where it is stored, else x. Deterministic."""
    matrix = _rows(saved, spec)
    rows = matrix.shape[0]
    x_grad = saved.new_empty(saved.shape, dtype=getattr(torch, spec.x))
    tensors: dict[str, Tensor | None] = {
        "out_grad": _rows(out_grad, spec),
        "saved": matrix,
        "sum_grad": _maybe_rows(sum_grad, spec),
        "x_grad": _rows(x_grad, spec),
        "weight": _vector(weight),
        "mean": mean,
        "rstd": rstd,
    }
    launch = backward_launch(spec)
    sums = spec.sums
    make = saved.new_empty if rows else saved.new_zeros
    grads: dict[str, Tensor | None] = {
        f"{name}_grad": make(spec.entries, dtype=getattr(torch, getattr(spec, name))) for name in sums
    }
    if rows:
        count = processors(saved.device)
        size = (sum_rows(spec, launch, rows, count), spec.entries)
        tensors |= {f"{name}_sums": saved.new_empty(size, dtype=torch.float32) for name in sums}
        grid = (programs(launch, rows, count), launch.parts)
        _start(wrap, _source_of_backward(spec, launch, sum_grad is not None), grid, tensors, rows=rows)
        if sums and not launch.persistent:
            number, rows_each = parts(rows, spec, launch, count)
            grid = (number, -(-spec.entries // launch.block))
            _start(wrap, _source_of_columns(spec, launch), grid, tensors, rows=rows, rows_each=rows_each)
        if sums:
            grid = (-(-spec.entries // SUM_COLUMNS), len(sums))
            _start(wrap, _source_of_sum(spec), grid, tensors | grads, rows=size[0])
    return Backward(x_grad, grads.get("weight_grad"), grads.get("bias_grad"), grads.get("x_bias_grad"))


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _maybe_rows(tensor: Tensor | None, spec: Spec) -> Tensor | None:
    return None if tensor is None else _rows(tensor, spec)


def _rows(tensor: Tensor, spec: Spec) -> Tensor:
    """The tensor as a matrix whose rows lie anywhere, their entries side by side."""
    matrix = tensor.reshape(-1, spec.entries)
    return matrix if matrix.stride(1) == 1 or spec.entries == 1 else matrix.contiguous()


def _start(
    wrap: Wrap, source: Source, grid: tuple[int, ...], tensors: dict[str, Tensor | None], **numbers: float
) -> None:
    given: list[object] = []
    for parameter in source.parameters:
        name, _, kind = parameter.rpartition("_")
        tensor = tensors.get(name)
        if kind == "ptr":
            given.append(tensor)
        elif kind == "stride" and tensor is not None:
            given.append(tensor.stride(0))
        else:
            given.append(numbers[parameter])
    with _device_of(tensors):
        wrap(build(source))[grid](*given, num_warps=source.warps)


def _device_of(tensors: dict[str, Tensor | None]) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one: a launch goes to that."""
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    initialised: Callable[[], bool] = torch.cuda.is_initialized  # torch leaves it untyped
    if device.type != "cuda" or not initialised() or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
