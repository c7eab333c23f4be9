"""pre_rms_norm: a LayerNorm on a centred stream is an RMSNorm.

    P = I − 11ᵀ/d,  x = Σ writers(a)    ⇒    γ ⊙ LN(x) + β  ==  γ ⊙ RMS(Σ P writers(a)) + β,    P(Wa + b) = (PW)a + Pb

"Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers" (Jiang et al. 2023),
section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from normfx.ir.sites import Sites
from normfx.rules import algebra, centring
from normfx.rules.columns import Columns
from normfx.rules.cut import Part
from normfx.rules.rule import Code, Example, Rule, SoFar, Symbols


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """Two writers, one skip: LN of their sum against RMS of the sum of centred writers."""
    x, a, weight, bias = symbols("x", d), symbols("a", 2), symbols("W", d, 2), symbols("b", d)
    eps = symbols("eps", 1)[0]
    plain = x + weight @ a + bias
    centred = algebra.center(x) + algebra.center(weight) @ a + algebra.center(bias)
    yield from zip(algebra.layer_norm(plain, eps), algebra.rms_norm(centred, eps), strict=True)


CODES = {
    **centring.CODES,
    "sharded_features": Code(
        "the features of what enters the stream are spread over processes, none of which has the mean of a row; "
        "centring whole rows after they are put together costs more than it saves",
        "split the weight that writes it along its input features (RowwiseParallel), an embedding along its rows",
    ),
}


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Part]:
    return (part for part in so_far.parts if part.stream.joins)


class _Block(nn.Module):
    """Two pre-LN residual branches over an embedding, read through a final norm."""

    def __init__(self, tap: str = "", norm_dims: int = 1) -> None:
        super().__init__()
        self.tap = tap
        self.table = nn.Embedding(10, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8 if norm_dims == 1 else (4, 8))
        self.up1, self.down1, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        if self.tap == "detached write":
            y = x.view(-1)
            y.mul_(2.0)
        x = x + self.down1(torch.relu(self.up1(self.norm1(x))))
        out = self.head(self.norm2(x))
        return (out, x) if self.tap == "output" else out


def _ids() -> tuple[torch.Tensor, ...]:
    return (torch.arange(8).reshape(2, 4),)


class _Packed(nn.Module):
    """A writer whose weight is stored as int8 with a scale."""

    packed: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.table, self.plain = nn.LayerNorm(8), nn.Embedding(10, 8), nn.Linear(8, 8)
        self.register_buffer("packed", torch.arange(64, dtype=torch.int8).reshape(8, 8))
        self.scale = nn.Parameter(torch.full((8, 1), 0.01))

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        return self.norm(self.plain(x) + nn.functional.linear(x, self.packed * self.scale))


class _PostNorm(nn.Module):
    """LN(x + f(x)) on a normalised stream: the skip carries γ⊙z + β, which has a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write, self.norm1, self.norm2 = (
            nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        )  # fmt: skip

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.norm1(self.table(ids))
        return self.norm2(x + self.write(x))


class _Statistics(nn.Module):
    """A LayerNorm whose mean is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(10, 8), nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, ids: torch.Tensor) -> Any:
        out, mean, _ = torch.native_layer_norm(self.table(ids), [8], self.weight, None, 1e-5)
        return out, mean


class _Joined(nn.Module):
    """Tokens of two projections, one after the other: nothing is added on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.left, self.right = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> Any:
        x = torch.tanh(self.table(ids))
        return self.norm(torch.cat([self.left(x), self.right(x)], 1))


RULE = Rule(
    name="pre_rms_norm",
    formula="LN(Σ w) == RMS(Σ P w)",
    source="Jiang et al. 2023, section 3",
    codes=CODES,
    identity=identity,
    mistake=("algebra.center", lambda a: a),
    candidates=candidates,
    guard=centring.guard,
    cost=centring.cost,
    rewrite=centring.rewrite,
    makes_rms_norms=True,
    example=Example("block", _Block, _ids),
    counterexamples=(
        Example("observed", lambda: _Block("output"), _ids, "observed"),
        Example("two axes", lambda: _Block(norm_dims=2), _ids, "several_axes"),
        Example("written in place", lambda: _Block("detached write"), _ids, "mutated"),
        Example("post-norm", _PostNorm, _ids, "uncentred_input"),
        Example("statistics returned", _Statistics, _ids, "opaque_norm"),
        Example("features spread over processes", Columns, _ids, "sharded_features"),
        Example("packed weight", _Packed, _ids, "packed_weight"),
        Example("half precision", lambda: _Joined().bfloat16(), _ids, "rounded_weight"),
        Example("few rows in training", _Block, _ids, "live_weights", fold="auto"),
    ),
)
