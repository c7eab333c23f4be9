"""bake_weights: weights that parameters alone decide are computed once."""

from typing import Any

import torch
from rule_test import RuleTest, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class BakeWeights(RuleTest):
    rule = "bake_weights"
    fold = "cached"

    def test_weight_norm(self) -> None:
        self.check(
            parametrizations.weight_norm(nn.Linear(64, 64)),
            """\
_weight_norm in parametrizations.weight.0: applied
args.0: f32[3, 64]
%0 = _weight_norm(parametrizations.weight.original1, parametrizations.weight.original0): f32[64, 64]  # parametrizations.weight.0
%1 = linear(args.0, %0, bias): f32[3, 64]
return [%1]
""",
            rows(3, 64),
        )

    def test_a_plain_weight(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)),
            """\
1: no site
args.0: f32[3, 4]
%0 = linear(args.0, 0.weight, 0.bias): f32[3, 6]
%1 = layer_norm(%0, [6], 1.weight, 1.bias): f32[3, 6]  # 1
return [%1]
""",
        )

    def test_a_low_rank_update(self) -> None:
        class LowRank(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base = nn.Linear(64, 64)
                self.a, self.b = nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.randn(64, 2))

            def forward(self, x: Tensor) -> Any:
                return nn.functional.linear(x, self.base.weight + self.b @ self.a, self.base.bias)

        self.check(
            LowRank(),
            """\
add: applied
x: f32[3, 64]
%0 = matmul(b, a): f32[64, 64]
%1 = add(base.weight, %0): f32[64, 64]
%2 = linear(x, %1, base.bias): f32[3, 64]
return [%2]
""",
            rows(3, 64),
        )
