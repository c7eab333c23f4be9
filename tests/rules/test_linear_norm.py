"""linear_norm: the norm of a linear layer that nothing else reads becomes an RMSNorm."""

from rule_test import RuleTest, rows
from torch import nn


class LinearNorm(RuleTest):
    rule = "linear_norm"

    def test_plain(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)),
            """\
1: applied
args.0: f32[3, 4]
%0 = center(0.weight, dim=0): f32[6, 4]
%1 = center(0.bias, dim=0): f32[6]
%2 = linear(args.0, %0, %1): f32[3, 6]
%3 = rms_norm(%2, 1.weight, bias=1.bias, dim=1, eps=1e-05): f32[3, 6]  # 1
return [%3]
""",
        )

    def test_without_bias_and_affine(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6, elementwise_affine=False)),
            """\
1: applied
args.0: f32[3, 4]
%0 = center(0.weight, dim=0): f32[6, 4]
%1 = linear(args.0, %0): f32[3, 6]
%2 = rms_norm(%1, dim=1, eps=1e-05): f32[3, 6]  # 1
return [%2]
""",
        )

    def test_through_dropout_in_eval(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.LayerNorm(6)).eval(),
            """\
2: applied
args.0: f32[3, 4]
%0 = center(0.weight, dim=0): f32[6, 4]
%1 = center(0.bias, dim=0): f32[6]
%2 = linear(args.0, %0, %1): f32[3, 6]
%3 = rms_norm(%2, 2.weight, bias=2.bias, dim=1, eps=1e-05): f32[3, 6]  # 2
return [%3]
""",
        )

    def test_an_activation_is_no_writer(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6)),
            """\
2: no site
args.0: f32[3, 4]
%0 = linear(args.0, 0.weight, 0.bias): f32[3, 6]
%1 = relu(%0): f32[3, 6]
%2 = layer_norm(%1, 2.weight, bias=2.bias, dim=1, eps=1e-05): f32[3, 6]  # 2
return [%2]
""",
        )

    def test_over_part_of_the_features(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)), nn.LayerNorm(3)),
            """\
2: applied
args.0: f32[3, 4]
%0 = center(0.weight, dim=0, size=3): f32[6, 4]
%1 = center(0.bias, dim=0, size=3): f32[6]
%2 = linear(args.0, %0, %1): f32[3, 6]
%3 = unflatten(%2, -1, [2, 3]): f32[3, 2, 3]
%4 = rms_norm(%3, 2.weight, bias=2.bias, dim=2, eps=1e-05): f32[3, 2, 3]  # 2
return [%4]
""",
        )

    def test_over_two_dimensions(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((3, 6))),
            """\
1: no site
args.0: f32[2, 3, 4]
%0 = linear(args.0, 0.weight, 0.bias): f32[2, 3, 6]
%1 = layer_norm(%0, [3, 6], 1.weight, 1.bias): f32[2, 3, 6]  # 1
return [%1]
""",
            rows(2, 3, 4),
        )
