"""The norms and the projection as formulas that run on object arrays of sympy symbols, for the rules' proofs.

Rows are one-dimensional arrays; weights have their output features first.
"""

from __future__ import annotations

from typing import Any

import sympy


def center(a: Any) -> Any:
    """P a along the first axis."""
    return a - a.sum(axis=0) / sympy.Integer(a.shape[0])


def rms_norm(x: Any, eps: Any) -> Any:
    """x / sqrt(mean(x²) + ε)."""
    return x / sympy.sqrt((x * x).sum() / sympy.Integer(x.shape[0]) + eps)


def layer_norm(x: Any, eps: Any) -> Any:
    """(x − mean x) / sqrt(mean((x − mean x)²) + ε)."""
    return rms_norm(center(x), eps)
