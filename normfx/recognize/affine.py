"""A norm of torch whose weight and bias are ops after it: γ ⊙ norm(x) + β, written `norm(x) * (gamma + 1) + beta`.

What follows the norm is read as what a norm written in single ops is (spelled.py): each node that depends on the norm
and parameters alone has an expression, and the last one that is still the same norm, with other γ and β, is its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import isclose

from torch.fx import Node

from normfx.graph.recompute import region_of
from normfx.ir.sites import Norm
from normfx.recognize import algebra
from normfx.recognize.algebra import M, Poly, S, X
from normfx.recognize.formula import Formula, read
from normfx.recognize.row_ops import HANDLERS
from normfx.recognize.rows import Form, Rows
from normfx.recognize.spelled import Order, expand, only_readers


def with_affine(norm: Norm, order: Order, parameters: frozenset[Node]) -> Norm:
    """The norm with the γ and β that ops after it multiply by and add, as far as nothing else reads what is between.

    γ and β are parameters, or computed from parameters alone. Statistics that are read, two factors that are not
    numbers, and everything in another mode or checkpointed region end it.
    """
    if norm.obstacle or norm.axis is None or norm.kind not in ("LayerNorm", "RMSNorm"):
        return norm
    rows = Rows(norm.input, norm.dims[0], parameters, HANDLERS)
    rows.forms[norm.output] = Form(_expression(norm))
    expand(rows, norm.output, order, order.region[norm.output])
    formulas = dict(_same(norm, rows))
    weight, bias, inside, end = norm.weight, norm.bias, [norm.output], norm
    for node in only_readers(norm.output, formulas):
        inside.append(node)
        found = formulas[node]
        if (found.weight, found.bias) != (weight, bias):
            weight, bias = found.weight, found.bias
            nodes, dtype = norm.nodes.union(inside), node.meta["val"].dtype
            end = replace(norm, output=node, nodes=nodes, weight=weight, bias=bias, out_dtype=dtype)
    return end


def _same(norm: Norm, rows: Rows) -> Iterator[tuple[Node, Formula]]:
    """Nodes after a norm that are this norm, whatever their γ and β."""
    for node in rows.forms:
        poly = rows.poly(node)
        found = read(poly, rows.size) if poly is not None and rows.is_full(node) else None
        if found is None or region_of(node) != region_of(norm.output):
            continue
        form = (found.kind, found.eps_place, found.correction)
        if form == (norm.kind, norm.eps_place, norm.correction) and isclose(found.eps, norm.eps, rel_tol=1e-9):
            yield node, found


def _expression(norm: Norm) -> Poly:
    """γ·(x − M)·(S − M² + ε)^(−1/2) + β, or γ·x·(S + ε)^(−1/2) + β."""
    x, square = algebra.atom(X), algebra.atom(S)
    if norm.kind == "LayerNorm":
        mean = algebra.atom(M)
        x, square = algebra.add(x, mean, -1), algebra.add(square, algebra.mul(mean, mean), -1)
    variance = algebra.add(square, algebra.constant(norm.eps))
    poly = algebra.mul(x, algebra.power(variance, Fraction(-1, 2)))
    poly = poly if norm.weight is None else algebra.mul(poly, algebra.atom(norm.weight))
    return poly if norm.bias is None else algebra.add(poly, algebra.atom(norm.bias))
