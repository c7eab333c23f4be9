"""The norms and the projection as formulas that run on object arrays of sympy symbols, for the rules' proofs.

Rows are one-dimensional arrays; weights have their output features first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy


def center(a: Any) -> Any:
    """P a along the first axis."""
    return a - a.sum(axis=0) / sympy.Integer(a.shape[0])


def rms_norm(x: Any, eps: Any) -> Any:
    """x / sqrt(mean(x²) + ε)."""
    return rms_norm_of(x, eps, x.shape[0])


def rms_norm_of(x: Any, eps: Any, d: int) -> Any:
    """x / sqrt(Σx²/d + ε)."""
    return x / sympy.sqrt((x * x).sum() / sympy.Integer(d) + eps)


def crms_norm(u: Any, eps: Any, d: int) -> Any:
    """u / sqrt((Σu² + (Σu)²)/d + ε)."""
    return u / sympy.sqrt(((u * u).sum() + u.sum() ** 2) / sympy.Integer(d) + eps)


def compress(x: Any, basis: str, channel: int) -> Any:
    """The d − 1 entries that a row with Σx = 0 is stored as."""
    kept, d = np.delete(x, channel), sympy.Integer(x.shape[0])
    return kept if basis == "drop" else kept + x[channel] * (sympy.sqrt(d) + 1) / (d - 1)  # 1/(√d − 1), rationalised


def compress_input(w: Any, basis: str, channel: int) -> Any:
    """A reader's row for such input."""
    kept, d = np.delete(w, channel), sympy.Integer(w.shape[0])
    if basis == "drop":
        return kept - w[channel]
    return kept + w[channel] / sympy.sqrt(d) - kept.sum() * (1 + 1 / sympy.sqrt(d)) / (d - 1)  # 1/(d − √d)


def layer_norm(x: Any, eps: Any) -> Any:
    """(x − mean x) / sqrt(mean((x − mean x)²) + ε). Without `center`, which the proofs are about."""
    d = sympy.Integer(x.shape[0])
    moved = x - x.sum() / d
    return moved / sympy.sqrt((moved * moved).sum() / d + eps)
