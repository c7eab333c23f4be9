"""Reading an expression as a norm.

With v the mean square (RMSNorm) or the biased variance (LayerNorm), a norm's reciprocal deviation is one of

    (k·v + e)^(−1/2) = k^(−1/2) · (v + e/k)^(−1/2)                  inside
    ((k·v)^(1/2) + e)^(−1) = k^(−1/2) · (v^(1/2) + e/√k)^(−1)       outside
    max(k·v, e)^(−1/2), max((k·v)^(1/2), √e)^(−1)                   clamped: max(v, e/k)^(−1/2)

and the whole expression is γ·(x − M)·c times that, plus β. With c = √k it is a norm as it stands; with
c = √(k·(d − n)/d) for an integer n, one whose divisor is d − n: n = 1 is the unbiased variance, n = d − 1 makes rows of
length 1 (ScaleNorm, "Transformers without Tears", eq. 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isclose, sqrt
from typing import Literal, TypeAlias

from torch.fx import Node

from normfx.recognize.algebra import Atom, Clamp, M, Monomial, Poly, Root, S, Statistic, X, statistic

EpsPlace: TypeAlias = Literal["inside", "outside", "clamped"]
HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Formula:
    """What an expression says when it is a norm; fields as in ir.sites.Norm."""

    kind: Literal["LayerNorm", "RMSNorm"]
    eps: float
    eps_place: EpsPlace
    correction: int
    weight: Node | None
    bias: Node | None


@dataclass(frozen=True)
class Deviation:
    """Reciprocal deviation (see above): scale is k, eps is e in the units of k·v ("outside": of its root)."""

    scale: float
    centred: bool
    eps: float
    place: EpsPlace


def read(p: Poly, size: int) -> Formula | None:
    """The norm that `p` is, over rows of `size` entries (0: unknown), or None."""
    split = _affine(p)
    if split is None:
        return None
    factor, centred, rest, bias = split
    weights = [a for a in rest if isinstance(a, Node)]
    atoms = {a: n for a, n in rest.items() if not isinstance(a, Node)}
    if len(weights) > 1 or len(atoms) != 1:
        return None
    ((base, exponent),) = atoms.items()
    deviation = _deviation(base, exponent)
    if deviation is None or deviation.centred != centred or deviation.scale <= 0 or deviation.eps < 0 or factor <= 0:
        return None
    correction = _correction(factor, deviation.scale, size)
    if correction is None:
        return None
    scale = deviation.scale if correction == 0 else factor * factor
    unit = 1.0 if isclose(scale, 1.0, rel_tol=1e-12) else sqrt(scale) if deviation.place == "outside" else scale
    return Formula(
        kind="LayerNorm" if centred else "RMSNorm",
        eps=deviation.eps / unit,
        eps_place=deviation.place,
        correction=correction,
        weight=weights[0] if weights else None,
        bias=bias,
    )


def _correction(factor: float, scale: float, size: int) -> int | None:
    """n with factor² = scale·(size − n)/size, if it is an integer from 0 to size − 1."""
    if isclose(factor * factor, scale, rel_tol=1e-9):
        return 0
    quotient = size * factor * factor / scale
    divisor = round(quotient) if quotient < size else size
    if not 1 <= divisor < size or not isclose(factor * factor * size, scale * divisor, rel_tol=1e-9):
        return None
    return size - divisor


def _affine(p: Poly) -> tuple[float, bool, dict[Atom, Fraction], Node | None] | None:
    """p = c·rest·x + β or c·rest·(x − M) + β, as (c, centred, rest, β)."""
    bias: list[Node] = []
    body: dict[Monomial, dict[Atom, float]] = {}
    for powers, c in p.items():
        ((first, n),) = powers.items() if len(powers) == 1 else ((X, Fraction(0)),)
        if isinstance(first, Node):
            if c != 1.0 or n != 1:
                return None
            bias.append(first)
            continue
        numerator = X if X in powers else M
        if powers.pop(numerator, None) != 1:
            return None
        body.setdefault(frozenset(powers.items()), {})[numerator] = c
    if len(bias) > 1 or len(body) != 1:
        return None
    ((rest, numerators),) = body.items()
    c = numerators.get(X, 0.0)
    centred = M in numerators
    if centred and not isclose(c, -numerators[M], rel_tol=1e-9):
        return None
    return c, centred, dict(rest), bias[0] if bias else None


def _deviation(base: Atom, exponent: Fraction) -> Deviation | None:
    if base == S and exponent == -HALF:
        return Deviation(1.0, False, 0.0, "inside")
    if isinstance(base, Root) and exponent == -HALF:
        found = statistic(base.inside)
        return Deviation(found.scale, found.centred, found.rest, "inside") if found else None
    if isinstance(base, Root) and exponent == -1:
        found = _rooted(base.inside)
        return Deviation(found.scale, found.centred, found.rest, "outside") if found else None
    if isinstance(base, Clamp) and exponent == -HALF:
        found = statistic(base.inside)
        return Deviation(found.scale, found.centred, base.least, "clamped") if found and not found.rest else None
    if isinstance(base, Clamp) and exponent == -1:
        found = _rooted(base.inside)
        return Deviation(found.scale, found.centred, base.least**2, "clamped") if found and not found.rest else None
    return None


def _rooted(p: Poly) -> Statistic | None:
    """Read p as (k·v)^(1/2) + e, without an epsilon under the root."""
    found: Statistic | None = None
    rest = 0.0
    for powers, c in p.items():
        if not powers:
            rest = c
            continue
        if found is not None or len(powers) != 1:
            return None
        ((base, exponent),) = powers.items()
        if exponent != HALF:
            return None
        inner = Statistic(1.0, False, 0.0) if base == S else statistic(base.inside) if isinstance(base, Root) else None
        if inner is None or inner.rest or c <= 0:
            return None
        found = Statistic(inner.scale * c * c, inner.centred, 0.0)
    return Statistic(found.scale, found.centred, rest) if found else None
