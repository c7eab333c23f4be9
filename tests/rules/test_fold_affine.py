"""fold_affine: γ and β of a norm become part of the linear layers that read it."""

from typing import Any

import torch
import torch.nn.functional as F
from rule_test import RuleTest, rows
from torch import Tensor, nn


class Readers(nn.Module):
    """A norm that several linear layers read, or something else too."""

    def __init__(self, *readers: nn.Module) -> None:
        super().__init__()
        self.norm, self.readers = nn.LayerNorm(4), nn.ModuleList(readers)

    def forward(self, x: Tensor) -> Any:
        z = self.norm(x)
        return [reader(z) for reader in self.readers]


class After(nn.Module):
    """A norm whose weight and bias are ops after it, or of which something else is made, read by a linear layer."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.norm, self.read = case, nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 5)
        self.gamma, self.beta = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.condition = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if self.case == "length":
            return self.read(F.normalize(x, dim=-1) * 2.0 * (self.gamma + 1))
        y = self.norm(x)
        if self.case == "data":
            return self.read(y * (self.condition(x) + 1))
        out = self.read(y * (self.gamma + 1) + self.beta)
        return (out, y.tanh()) if self.case == "read" else out


class FoldAffine(RuleTest):
    rule = "fold_affine"

    def test_one_reader(self) -> None:
        self.check(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6)),
            """\
0: applied
args.0: f32[3, 4]
%0 = layer_norm(args.0, dim=1, eps=1e-05): f32[3, 4]  # 0
%1 = fold_shift(1.weight, 0.bias, bias=1.bias, dim=1): f32[6]
%2 = scale_features(1.weight, 0.weight, dim=1): f32[6, 4]
%3 = linear(%0, %2, %1): f32[3, 6]
return [%3]
""",
        )

    def test_two_readers_one_without_bias(self) -> None:
        self.check(
            Readers(nn.Linear(4, 6), nn.Linear(4, 5, bias=False)),
            """\
norm: applied
x: f32[3, 4]
%0 = layer_norm(x, dim=1, eps=1e-05): f32[3, 4]  # norm
%1 = fold_shift(readers.0.weight, norm.bias, bias=readers.0.bias, dim=1): f32[6]
%2 = scale_features(readers.0.weight, norm.weight, dim=1): f32[6, 4]
%3 = linear(%0, %2, %1): f32[3, 6]
%4 = fold_shift(readers.1.weight, norm.bias, dim=1): f32[5]
%5 = scale_features(readers.1.weight, norm.weight, dim=1): f32[5, 4]
%6 = linear(%0, %5, %4): f32[3, 5]
return [%3, %6]
""",
        )

    def test_rms_norm(self) -> None:
        self.check(
            nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 6, bias=False)),
            """\
0: applied
args.0: f32[3, 4]
%0 = rms_norm(args.0, dim=1, eps=1.19209e-07): f32[3, 4]  # 0
%1 = scale_features(1.weight, 0.weight, dim=1): f32[6, 4]
%2 = linear(%0, %1): f32[3, 6]
return [%2]
""",
        )

    def test_without_beta(self) -> None:
        self.check(
            nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 6)),
            """\
0: applied
args.0: f32[3, 4]
%0 = layer_norm(args.0, dim=1, eps=1e-05): f32[3, 4]  # 0
%1 = scale_features(1.weight, 0.weight, dim=1): f32[6, 4]
%2 = linear(%0, %1, 1.bias): f32[3, 6]
return [%2]
""",
        )

    def test_a_reader_that_is_not_linear(self) -> None:
        self.check(
            Readers(nn.Linear(4, 6), nn.Tanh()),
            """\
norm: reader_not_linear
x: f32[3, 4]
%0 = layer_norm(x, norm.weight, bias=norm.bias, dim=1, eps=1e-05): f32[3, 4]  # norm
%1 = linear(%0, readers.0.weight, readers.0.bias): f32[3, 6]
%2 = tanh(%0): f32[3, 4]
return [%1, %2]
""",
        )

    def test_a_reader_of_other_features(self) -> None:
        self.check(
            nn.Sequential(nn.LayerNorm(4), nn.Flatten(1), nn.Linear(8, 3)),
            """\
0: applied
args.0: f32[3, 2, 4]
%0 = layer_norm(args.0, dim=2, eps=1e-05): f32[3, 2, 4]  # 0
%1 = flatten(%0, 1): f32[3, 8]
%2 = fold_shift(2.weight, 0.bias, bias=2.bias, dim=1, size=4): f32[3]
%3 = scale_features(2.weight, 0.weight, dim=1, size=4): f32[3, 8]
%4 = linear(%1, %3, %2): f32[3, 3]
return [%4]
""",
            rows(3, 2, 4),
        )

    def test_weight_and_bias_after_the_norm(self) -> None:
        self.check(
            After("plain"),
            """\
norm: applied
add: no site
x: f32[3, 4]
%0 = add(gamma, 1): f32[4]
%1 = layer_norm(x, dim=1, eps=1e-05): f32[3, 4]
%2 = fold_shift(read.weight, beta, bias=read.bias, dim=1): f32[5]
%3 = scale_features(read.weight, %0, dim=1): f32[5, 4]
%4 = linear(%1, %3, %2): f32[3, 5]
return [%4]
""",
        )

    def test_weight_after_a_clamped_length(self) -> None:
        self.check(
            After("length"),
            """\
rms_norm: applied
add: no site
x: f32[3, 4]
%0 = add(gamma, 1): f32[4]
%1 = rms_norm(x, dim=1, eps=2.5e-25, eps_place=clamped): f32[3, 4]
%2 = scale_features(read.weight, %0, dim=1): f32[5, 4]
%3 = linear(%1, %2, read.bias): f32[3, 5]
return [%3]
""",
        )

    def test_the_norm_is_read_without_its_weight(self) -> None:
        self.check(
            After("read"),
            """\
norm: no_affine
affine: applied
add: no site
x: f32[3, 4]
%0 = layer_norm(x, dim=1, eps=1e-05): f32[3, 4]  # norm
%1 = add(gamma, 1): f32[4]
%2 = fold_shift(read.weight, beta, bias=read.bias, dim=1): f32[5]
%3 = scale_features(read.weight, %1, dim=1): f32[5, 4]
%4 = linear(%0, %3, %2): f32[3, 5]
%5 = tanh(%0): f32[3, 4]
return [%4, %5]
""",
        )

    def test_weight_computed_from_data(self) -> None:
        self.check(
            After("data"),
            """\
norm: no_affine
x: f32[3, 4]
%0 = layer_norm(x, dim=1, eps=1e-05): f32[3, 4]  # norm
%1 = linear(x, condition.weight, condition.bias): f32[3, 4]
%2 = add(%1, 1): f32[3, 4]
%3 = mul(%0, %2): f32[3, 4]
%4 = linear(%3, read.weight, read.bias): f32[3, 5]
return [%4]
""",
        )
