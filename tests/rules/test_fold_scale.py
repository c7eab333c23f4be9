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

    def test_over_two_dimensions(self) -> None:
        """No canonical op computes it, with whatever factor."""

        class Planes(Scaled):
            def __init__(self) -> None:
                super().__init__(0.5)
                self.norm = nn.LayerNorm((3, 4))

        self.check(
            Planes(),
            """\
norm: no site
x: f32[2, 3, 4]
%0 = layer_norm(x, [3, 4], norm.weight, norm.bias): f32[2, 3, 4]  # norm
%1 = mul(%0, 0.5): f32[2, 3, 4]
return [%1]
""",
            rows(2, 3, 4),
        )

    def test_over_two_dimensions_of_one_size_without_affine(self) -> None:
        class Planes(Scaled):
            def __init__(self) -> None:
                super().__init__(-2.0)
                self.norm = nn.RMSNorm((4, 4), elementwise_affine=False)

        self.check(
            Planes(),
            """\
norm: no site
x: f32[2, 4, 4]
%0 = rms_norm(x, [4, 4]): f32[2, 4, 4]  # norm
%1 = mul(%0, -2): f32[2, 4, 4]
return [%1]
""",
            rows(2, 4, 4),
        )
