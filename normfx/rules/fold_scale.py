"""fold_scale: a number that multiplies a norm's output moves into the norm's row factor.

    (γ ⊙ x·rstd + β)·k  ==  γ ⊙ x·(k·rstd) + k·β

One multiplication per row instead of one per entry. Source: maths M10; LayerNorm Scaling ("The Curse of Depth in Large
Language Models", Sun et al. 2025) is its usual customer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of
from normfx.ir.sites import Scaled, Sites
from normfx.rules import algebra
from normfx.rules.rule import Cost, Example, Objection, Rule, SoFar, Symbols


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    x, gamma, beta = symbols("x", d), symbols("gamma", d), symbols("beta", d)
    k, eps = symbols("k", 1)[0], symbols("eps", 1)[0]
    rstd = 1 / sympy.sqrt((x * x).sum() / sympy.Integer(d) + eps)
    outside = (gamma * algebra.rms_norm(x, eps) + beta) * k
    yield from zip(outside, gamma * (x * (k * rstd)) + k * beta, strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Scaled]:
    return sites.scaled.values()


def guard(site: Scaled, so_far: SoFar) -> Iterator[Objection]:
    """A candidate is a norm that a canonical op computes and whose only reader multiplies by a finite number: nothing
    speaks against it."""
    return iter(())


def cost(site: Scaled) -> Cost:
    """One pass; afterwards none."""
    return Cost(bytes_of(site.node), sympy.Integer(0))


def rewrite(site: Scaled, edit: Edit) -> None:
    edit.norm(site.norm).scale *= site.factor
    edit.absorb(site.norm, site.node)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.read(self.norm(x) / 3.0**0.5)
        return out


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="fold_scale",
    formula="(γ⊙z + β)·k == γ⊙(k·z) + k·β",
    source="Sun et al. 2025 (LayerNorm Scaling)",
    codes={},
    identity=identity,
    mistake=("algebra.rms_norm", lambda x, eps: x),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    summary="{norms} {are} computed together with the number that multiplies the output",
    example=Example("scaled", _Scaled, _input),
)
