"""fold_scale: a number that multiplies a norm's output becomes part of γ and β."""

from typing import Any

from rule_test import RuleTest, rows
from torch import Tensor, nn


class Scaled(nn.Module):
    def __init__(self, factor: float, affine: bool = True, keep: bool = False) -> None:
        super().__init__()
        self.norm, self.factor, self.keep = nn.LayerNorm(4, elementwise_affine=affine), factor, keep

    def forward(self, x: Tensor) -> Any:
        z = self.norm(x)
        return (z * self.factor, z) if self.keep else z * self.factor


class FoldScale(RuleTest):
    rule = "fold_scale"

    def test_a_number(self) -> None:
        self.check(
            Scaled(0.5),
            """\
norm: applied
x: f32[3, 4]
%0 = layer_norm(x, norm.weight, bias=norm.bias, dim=1, eps=1e-05, scale=0.5): f32[3, 4]  # norm
return [%0]
""",
        )

    def test_a_negative_number_without_affine(self) -> None:
        self.check(
            Scaled(-2.0, affine=False),
            """\
norm: applied
x: f32[3, 4]
%0 = layer_norm(x, dim=1, eps=1e-05, scale=-2): f32[3, 4]  # norm
return [%0]
""",
        )

    def test_read_before_the_number(self) -> None:
        self.check(
            Scaled(0.5, keep=True),
            """\
norm: no site
x: f32[3, 4]
%0 = layer_norm(x, norm.weight, bias=norm.bias, dim=1, eps=1e-05): f32[3, 4]  # norm
%1 = mul(%0, 0.5): f32[3, 4]
return [%1, %0]
""",
        )

    def test_a_quotient(self) -> None:
        class Quotient(Scaled):
            def forward(self, x: Tensor) -> Any:
                return self.norm(x) / self.factor

        self.check(
            Quotient(8.0),
            """\
norm: applied
x: f32[2, 3, 4]
%0 = layer_norm(x, norm.weight, bias=norm.bias, dim=2, eps=1e-05, scale=0.125): f32[2, 3, 4]  # norm
return [%0]
""",
            rows(2, 3, 4),
        )
