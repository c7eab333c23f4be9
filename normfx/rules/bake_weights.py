"""bake_weights: a weight computed from parameters alone is one weight, computed when they change and not in every call.

    (U V) x  ==  U (V x)        and likewise g·v/‖v‖, W/σ(W), W + s·BA, masks: the graph reads the composed weight

Weight normalisation (Salimans and Kingma 2016), spectral normalisation in eval (Miyato et al. 2018), low-rank products.
Source: maths M17. The values are kept and renewed by weights/store.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of, entries, shape, total
from normfx.ir.sites import Composed, Sites
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols

SMALL = 4096
"""Entries below which computing a value costs less than looking after it."""


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """A composed weight acts as its factors do."""
    left, right, x = symbols("U", d, 2), symbols("V", 2, d), symbols("x", d)
    yield from zip((left @ right) @ x, left @ (right @ x), strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Composed]:
    return sites.composed


def guard(site: Composed, so_far: SoFar) -> Iterator[Objection]:
    if site.live:
        yield "live", ", ".join(node.name for node in site.live), site.live
    if site.obstacle:
        yield site.obstacle, site.node.name, (site.node,)
    size = total(entries(shape(node)) for node in site.nodes)
    if not site.live and not site.obstacle and size < SMALL:
        yield "small", f"{size} entries", (site.node,)


def cost(site: Composed) -> Cost:
    """One pass over each intermediate value; afterwards none."""
    return Cost(total(map(bytes_of, site.nodes)), sympy.Integer(0))


def rewrite(site: Composed, edit: Edit) -> None:
    edit.bake(site.node)


class _Normed(nn.Module):
    """A linear with weight normalisation whose parameters are not trained."""

    codes: torch.Tensor

    def __init__(self, tap: str = "", features: int = 64) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(features**2).to(torch.int8).reshape(features, features))
        self.tap = tap
        self.read = nn.utils.parametrizations.weight_norm(nn.Linear(features, features))
        self.read.requires_grad_(tap == "trained")
        self.norm = nn.LayerNorm(features)

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap == "returned":
            return self.norm(x), self.read.weight
        if self.tap == "packed":
            return torch.tanh(nn.functional.linear(torch.tanh(self.norm(x)), self.codes.to(x.dtype) * 0.01))
        if self.tap == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.read(self.norm(x))
        return torch.tanh(self.read(torch.tanh(self.norm(x))))


def _input(features: int = 64) -> tuple[torch.Tensor, ...]:
    return (torch.randn(5, features, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="bake_weights",
    formula="(U V) x == U (V x)",
    source="maths M17",
    codes={
        "live": Code(
            "the weight's gradient is needed or folds are live, so it is computed in every call",
            "run inference under torch.no_grad(), with options={'fold': 'auto'}; in an exported program, with 'frozen'",
        ),
        "leaves": Code(
            "the graph returns or writes the memory of the weight: its owner would see it change",
            "return a copy: weight.clone()",
        ),
        "autocast": Code(
            "the ops that compute the weight may run in lower precision under autocast",
            "none needed: the weight is computed in every call",
        ),
        "packed_weight": Code(
            "the weight is stored in fewer bits than it is computed in: kept, it would be stored unpacked",
            "none needed: the weight is computed in every call",
        ),
        "small": Code("computing the weight costs less than keeping it", "none needed"),
    },
    identity=identity,
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    example=Example("weight norm", _Normed, _input, fold="auto"),
    counterexamples=(
        Example("trained", lambda: _Normed("trained"), _input, "live", fold="auto"),
        Example("returned", lambda: _Normed("returned"), _input, "leaves", fold="auto"),
        Example("autocast", lambda: _Normed("autocast"), _input, "autocast", fold="auto"),
        Example("packed", lambda: _Normed("packed"), _input, "packed_weight", fold="auto"),
        Example("small", lambda: _Normed(features=4), lambda: _input(4), "small", fold="auto"),
    ),
)
