"""Exact algebra over the rows of one value: how every spelling of a norm becomes the same expression.

An expression is a sum of products of atoms with number coefficients. For a value x and one of its axes:

    x           the value itself
    M = mean(x)     S = mean(x²)        one number per row
    Root(p)     a sum p of the above, kept as one atom because it carries a power that is not 1
    Clamp(p, m) max(p, m)
    a graph node    a parameter broadcast along the axis

Means are linear: mean(r·x) = r·M and mean(r·x²) = r·S for any per-row r, so mean((x − M)²) = S − M² comes out
by itself: one form for E[x²] − μ², the two-pass variance, torch.var and sums of x·x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isclose
from typing import TypeAlias

from torch.fx import Node


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Root:
    inside: Poly


@dataclass(frozen=True)
class Clamp:
    inside: Poly
    least: float


X, M, S = Symbol("x"), Symbol("mean"), Symbol("mean of squares")
Atom: TypeAlias = "Symbol | Root | Clamp | Node"
Monomial: TypeAlias = "frozenset[tuple[Atom, Fraction]]"
ONE: Monomial = frozenset()
MAX_TERMS = 8


class Outside(Exception):
    """The result is not an expression of this algebra; the node is then an ordinary reader of the value."""


@dataclass(frozen=True)
class Poly:
    """Σ coefficient · Π atom^power; equal expressions compare and hash equal."""

    terms: frozenset[tuple[Monomial, float]]

    def items(self) -> Iterable[tuple[dict[Atom, Fraction], float]]:
        return ((dict(monomial), coefficient) for monomial, coefficient in self.terms)

    def __contains__(self, atom: Atom) -> bool:
        return any(atom == a for monomial, _ in self.terms for a, _ in monomial)

    @property
    def per_row(self) -> bool:
        """Holds one number per row: neither the value nor a parameter occurs."""
        return not any(a == X or isinstance(a, Node) for monomial, _ in self.terms for a, _ in monomial)

    @property
    def number(self) -> float | None:
        """The constant this is, if it is one."""
        if not self.terms:
            return 0.0
        ((monomial, coefficient), *rest) = self.terms
        return coefficient if not rest and monomial == ONE else None


def _poly(terms: Mapping[Monomial, float]) -> Poly:
    if len(terms) > MAX_TERMS:
        raise Outside
    return Poly(frozenset((monomial, _snap(c)) for monomial, c in terms.items() if c != 0.0))


def _snap(c: float) -> float:
    """49·(1/49) is 1: undo the rounding of number coefficients, never of an epsilon."""
    nearest = round(c)
    return float(nearest) if nearest and isclose(c, nearest, rel_tol=1e-12) else c


def constant(c: float) -> Poly:
    return _poly({ONE: float(c)})


def atom(a: Atom) -> Poly:
    return Poly(frozenset([(frozenset([(a, Fraction(1))]), 1.0)]))


def add(p: Poly, q: Poly, alpha: float = 1.0) -> Poly:
    """p + alpha·q"""
    terms = dict(p.terms)
    for monomial, c in q.terms:
        old, new = terms.get(monomial, 0.0), alpha * c
        total = old + new
        terms[monomial] = 0.0 if abs(total) <= 1e-12 * abs(old) else total
    return _poly(terms)


def mul(p: Poly, q: Poly) -> Poly:
    total = constant(0.0)
    for left, a in p.terms:
        for right, b in q.terms:
            monomial, unfolded = _product(left, right)
            term = _poly({monomial: a * b})
            total = add(total, mul(term, unfolded) if unfolded is not None else term)
    return total


def _product(left: Monomial, right: Monomial) -> tuple[Monomial, Poly | None]:
    """Merge powers; a Root that comes out with power 1 is the sum it stands for."""
    powers = dict(left)
    for a, n in right:
        powers[a] = powers.get(a, Fraction(0)) + n
    if powers.get(X, Fraction(0)) not in (0, 1, 2) or any(
        isinstance(a, Node) and n not in (0, 1) for a, n in powers.items()
    ):
        raise Outside
    unfolded: Poly | None = None
    for a, n in list(powers.items()):
        if n == 0:
            del powers[a]
        elif n == 1 and isinstance(a, Root):
            del powers[a]
            unfolded = a.inside if unfolded is None else mul(unfolded, a.inside)
    return frozenset(powers.items()), unfolded


def power(p: Poly, n: Fraction) -> Poly:
    """p^n; powers other than 0, 1, 2 only of per-row expressions."""
    if n == 1:
        return p
    if n == 2:
        return mul(p, p)
    if not p.per_row or not p.terms:
        raise Outside
    if len(p.terms) > 1:
        return _poly({frozenset([(Root(p), n)]): 1.0})
    ((monomial, c),) = p.terms
    if c < 0 or (n.denominator != 1 and any(a == M for a, _ in monomial)):
        raise Outside
    result = _poly({ONE: c ** float(n)})
    for a, m in monomial:
        merged, unfolded = _product(frozenset([(a, m * n)]), ONE)
        result = mul(result, _poly({merged: 1.0}) if unfolded is None else unfolded)
    return result


def mean(p: Poly) -> Poly:
    """Mean along the axis: x → M, x² → S, per-row factors come out."""
    total = constant(0.0)
    for monomial, c in p.terms:
        powers = dict(monomial)
        if any(isinstance(a, Node) for a in powers):
            raise Outside
        degree = powers.pop(X, Fraction(0))
        rest = _poly({frozenset(powers.items()): c})
        total = add(total, rest if degree == 0 else mul(rest, atom(M if degree == 1 else S)))
    return total


def nonnegative(p: Poly) -> bool:
    """k·S + e or k·(S − M²) + e with k, e ≥ 0, or one product of nonnegative atoms."""
    found = statistic(p)
    if found is not None:
        return found.scale > 0 and found.rest >= 0
    return len(p.terms) == 1 and all(c > 0 and all(a not in (M, X) for a in m) for m, c in p.items())


def clamp(p: Poly, least: float) -> Poly:
    """max(p, least)"""
    if not p.per_row:
        raise Outside
    if least <= 0 and nonnegative(p):
        return p
    if least <= 0:
        raise Outside
    return atom(Clamp(p, least))


@dataclass(frozen=True)
class Statistic:
    """scale · (mean square, or variance if centred) + rest"""

    scale: float
    centred: bool
    rest: float


def statistic(p: Poly) -> Statistic | None:
    """Read p as k·S + e or k·(S − M²) + e."""
    square: Monomial = frozenset([(S, Fraction(1))])
    mean_squared: Monomial = frozenset([(M, Fraction(2))])
    terms = dict(p.terms)
    scale, minus, rest = terms.pop(square, 0.0), terms.pop(mean_squared, 0.0), terms.pop(ONE, 0.0)
    if terms or scale == 0.0 or (minus != 0.0 and not isclose(scale, -minus, rel_tol=1e-9)):
        return None
    return Statistic(scale, minus != 0.0, rest)


def proportional(p: Poly, a: Atom) -> bool:
    """p = number·a"""
    return len(p.terms) == 1 and all(powers == {a: 1} for powers, _ in p.items())
