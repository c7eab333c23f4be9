"""linear_norm: a LayerNorm fed by one linear is an RMSNorm with that linear centred (no residual stream needed).

    LN(Wa + b)  ==  RMS((PW)a + Pb)        P acts on exactly the features that form a row of the norm: per head, if so

Same identity as pre_rms_norm with one writer (maths: M4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from normfx.ir.sites import Sites
from normfx.rules import algebra, centring
from normfx.rules.cut import Part
from normfx.rules.rule import Example, Rule, SoFar, Symbols


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """One linear with a bias."""
    a, weight, bias, eps = symbols("a", 2), symbols("W", d, 2), symbols("b", d), symbols("eps", 1)[0]
    plain = algebra.layer_norm(weight @ a + bias, eps)
    centred = algebra.rms_norm(algebra.center(weight) @ a + algebra.center(bias), eps)
    yield from zip(plain, centred, strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Part]:
    return (part for part in so_far.parts if not part.stream.joins)


class _Heads(nn.Module):
    """A projection, split into heads, each normalised."""

    codes: torch.Tensor
    shift: torch.Tensor

    def __init__(self, case: str = "") -> None:
        super().__init__()
        self.case = case
        self.register_buffer("codes", torch.arange(72, dtype=torch.int8).reshape(12, 6))
        self.register_buffer("shift", torch.linspace(-1.0, 1.0, 12))
        self.project, self.norm = nn.Linear(6, 12), nn.LayerNorm(4)
        self.tokens = nn.Linear(5, 5, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        weight = self.codes.to(x.dtype) * 0.01 if self.case == "packed" else self.project.weight
        projected = nn.functional.linear(x, weight, self.shift if self.case == "written" else self.project.bias)
        if self.case == "written":
            self.shift.mul_(1.0)
        mixed = projected
        if self.case in ("activation", "returned"):  # a linear that mixes tokens: the stream passes through it
            entered = torch.tanh(projected) if self.case == "activation" else projected
            mixed = self.tokens(entered.transpose(1, 2)).transpose(1, 2).contiguous()
        heads = self.norm(mixed.view(2, 5, 3, 4))
        return (heads, projected) if self.case == "returned" else heads


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="linear_norm",
    formula="LN(Wa + b) == RMS(PW a + Pb)",
    source="Jiang et al. 2023, equation 5 applied to a single linear",
    codes={code: text for code, text in centring.CODES.items() if code not in ("opaque_norm", "several_axes")},
    identity=identity,
    mistake=("algebra.center", lambda a: a),
    candidates=candidates,
    guard=centring.guard,
    cost=centring.cost,
    rewrite=centring.rewrite,
    makes_rms_norms=True,
    example=Example("heads", _Heads, _input),
    counterexamples=(
        Example("packed weight", lambda: _Heads("packed"), _input, "packed_weight"),
        Example("written in place", lambda: _Heads("written"), _input, "mutated"),
        Example("activation", lambda: _Heads("activation"), _input, "uncentred_input"),
        Example("returned", lambda: _Heads("returned"), _input, "observed"),
        Example("few rows in training", _Heads, _input, "live_weights", fold="auto"),
        Example("half precision", lambda: _Heads().bfloat16(), lambda: (_input()[0].bfloat16(),), "rounded_weight"),
    ),
)
