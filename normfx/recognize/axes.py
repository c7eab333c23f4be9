"""Where the feature axis goes in ops that only move entries: reshapes, permutations, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from normfx.graph.nodes import extent, is_one, shape, value
from normfx.ir.sites import Axis

Shape = Sequence["int | torch.SymInt"]


def is_whole(node: Node, axis: Axis) -> bool:
    """Whether the features have a dimension of this value, or of its pieces, to themselves."""
    val = node.meta["val"]
    sizes = shape(node) if isinstance(val, torch.Tensor) else tuple(val[0].shape)
    return axis.inner == 1 and bool(extent(sizes[axis.dim]) == axis.size)


def reshape_axis(have: Shape, want: Shape, axis: Axis) -> Axis | None:
    """The axis of a value of shape `have` in its reshape to `want`; None when it is cut or merged crosswise.

    Row-major order: the axis has stride s = (product of the dimensions after it)·inner and s·size entries to its end;
    the dimension of `want` that holds it must begin at a stride dividing s and end at a multiple of s·size.
    """
    stride = sympy.Integer(axis.inner)
    for n in have[axis.dim + 1 :]:
        stride = stride * extent(n)
    begin = sympy.Integer(1)
    for dim in range(len(want) - 1, -1, -1):
        n = want[dim]
        if not is_one(n):
            inner = sympy.cancel(stride / begin)
            outer = sympy.cancel(begin * extent(n) / (stride * axis.size))
            if inner.is_Integer and inner >= 1 and _whole(outer):
                return Axis(dim, axis.size, int(inner))
        begin = begin * extent(n)
    return None


def _whole(expr: sympy.Expr) -> bool:
    if expr.is_Integer:
        return bool(expr >= 1)
    return not expr.is_Rational and sympy.fraction(expr)[1] == 1


def permute_axis(dims: Sequence[int], axis: Axis) -> Axis:
    """Input axis of a permutation whose output dimension i is input dimension dims[i]."""
    return axis.at(dims[axis.dim] % len(dims))


def expand_axis(operand: Node, ndim: int, axis: Axis) -> Axis | None:
    """Axis of a broadcast operand of an op with `ndim` output dimensions; None where it is constant along it."""
    have = shape(operand)
    dim = axis.dim - (ndim - len(have))
    return None if dim < 0 or is_one(have[dim]) else axis.at(dim)


def index_axis(node: Node, source: Node, indices: Sequence[Any], axis: Axis) -> Axis | None:
    """Input axis of source[indices] (aten.index.Tensor), when the feature axis itself is not indexed."""
    layout = indexed_dims(source, indices)
    if layout is None or len(layout) != len(shape(node)) or layout[axis.dim] < 0:
        return None
    return axis.at(layout[axis.dim])


def indexed_dims(source: Node, indices: Sequence[Any]) -> list[int] | None:
    """For each dimension of source[indices], that of the source; -1 where it runs over an index. None: no index."""
    ndim = len(shape(source))
    kept: list[int] = []
    indexed: list[int] = []
    index_ndim = 0
    dim = 0
    for index in [*indices, *[None] * ndim]:
        if dim >= ndim:
            break
        if index is None:
            kept.append(dim)
            dim += 1
            continue
        fake = value(index)
        if fake is None:
            return None
        mask = fake.dtype in (torch.bool, torch.uint8)
        index_ndim = max(index_ndim, 1 if mask else fake.ndim)
        indexed += range(dim, dim + (fake.ndim if mask else 1))
        dim += fake.ndim if mask else 1
    if not indexed:
        return None
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = [d for d in kept if d < indexed[0]] if adjacent else []
    return [*front, *[-1] * index_ndim, *[d for d in kept if d not in front]]
