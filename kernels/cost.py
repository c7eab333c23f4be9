"""Bytes and operations of a norm kernel: what it must move, from its specification, in symbolic sizes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .spec import DTYPES, Spec

STATISTIC = 4
"""Bytes of a row's mean or rstd, and of an entry of partial sums: float32."""


@dataclass(frozen=True)
class Cost:
    """read, written: bytes of global memory, each counted once (what is read again comes from a cache); operations:
    floating-point additions and multiplications"""

    read: sympy.Expr
    written: sympy.Expr
    operations: sympy.Expr

    @property
    def bytes(self) -> sympy.Expr:
        return self.read + self.written


def forward_cost(spec: Spec, rows: sympy.Expr, statistics: bool) -> Cost:
    entries = rows * spec.entries
    kept = STATISTIC * (1 + spec.centre) if statistics else 0
    residual = 1 + (spec.alpha != 1.0) + (spec.x_bias is not None) if spec.residual else 0
    vectors = (spec.weight is not None) + (spec.bias is not None) + spec.unit_offset
    # a square and its sum, times rstd; a sum and a difference for each mean that is subtracted
    operations = 3 + 2 * spec.centre + 2 * spec.centre_output + spec.compressed + residual + vectors
    inner, inner_vectors = spec.inner, 0
    if inner is not None:
        kept += STATISTIC * (1 + inner.centre) if statistics else 0
        operations += 3 + 2 * inner.centre + 2 * inner.centre_output + bool(inner.weight) + bool(inner.bias)
        inner_vectors = _size(inner.weight) + _size(inner.bias)
    vector_bytes = _size(spec.weight) + _size(spec.bias) + _size(spec.x_bias) + inner_vectors
    return Cost(
        entries * (_size(spec.x) + _size(spec.residual)) + spec.entries * vector_bytes,
        entries * (_size(spec.out) + _size(spec.sum)) + rows * kept,
        entries * operations,
    )


def backward_cost(spec: Spec, rows: sympy.Expr, sum_grad: bool, programs: sympy.Expr) -> Cost:
    """programs: rows of partial sums for dγ, dβ and Σds, which are written and read once more."""
    entries = rows * spec.entries
    partial = STATISTIC * len(spec.sums) * programs * spec.entries
    # x̂, a product and its sum, its share of dx, times rstd; means as in forward
    operations = 6 + 4 * spec.centre + 2 * spec.centre_output + 2 * spec.compressed
    operations += 3 * (spec.weight is not None) + (spec.bias is not None) + (spec.x_bias is not None) + sum_grad
    return Cost(
        entries * (_size(spec.out) + _size(spec.saved) + sum_grad * _size(spec.sum))
        + rows * STATISTIC * (1 + spec.centre)
        + spec.entries * _size(spec.weight)
        + partial,
        entries * _size(spec.x) + partial + spec.entries * sum(_size(getattr(spec, name)) for name in spec.sums),
        entries * operations,
    )


def _size(dtype: str | None) -> int:
    return DTYPES[dtype] if dtype else 0
