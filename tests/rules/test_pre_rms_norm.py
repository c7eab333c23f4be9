"""pre_rms_norm: norms of a stream whose writers are centred become RMSNorms."""

from typing import Any

import torch
from rule_test import RuleTest, rows
from torch import Tensor, nn


class Stream(nn.Module):
    """x = in(x); x = x + f(norm(x)), as often as there are branches; out(norm(x)).

    tap: what else reads the stream, or what stands in it
    """

    def __init__(self, branches: int = 1, tap: str = "") -> None:
        super().__init__()
        self.tap, self.enter = tap, nn.Linear(4, 6)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(branches + 1))
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(branches))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        for norm, branch in zip(self.norms[:-1], self.branches, strict=True):
            y = branch(norm(x))
            x = x + (torch.relu(y) if self.tap == "relu" else 0.5 * y if self.tap == "half" else y)
        z = self.out(self.norms[-1](x))
        return (z, x) if self.tap == "returned" else z


class PreRMSNorm(RuleTest):
    rule = "pre_rms_norm"

    def test_two_writers(self) -> None:
        self.check(
            Stream(),
            """\
norms.0: applied
norms.1: applied
x: f32[3, 4]
%0 = center(enter.weight, dim=0): f32[6, 4]
%1 = center(enter.bias, dim=0): f32[6]
%2 = linear(x, %0, %1): f32[3, 6]
%3 = _log_api_usage_once(python.nn_module)
%4 = rms_norm(%2, norms.0.weight, bias=norms.0.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.0
%5 = center(branches.0.weight, dim=0): f32[6, 6]
%6 = center(branches.0.bias, dim=0): f32[6]
%7 = linear(%4, %5, %6): f32[3, 6]
%8 = add(%2, %7): f32[3, 6]
%9 = rms_norm(%8, norms.1.weight, bias=norms.1.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.1
%10 = linear(%9, out.weight, out.bias): f32[3, 2]
return [%10]
""",
        )

    def test_a_scaled_branch(self) -> None:
        self.check(
            Stream(tap="half"),
            """\
norms.0: applied
norms.1: applied
x: f32[2, 3, 4]
%0 = center(enter.weight, dim=0): f32[6, 4]
%1 = center(enter.bias, dim=0): f32[6]
%2 = linear(x, %0, %1): f32[2, 3, 6]
%3 = _log_api_usage_once(python.nn_module)
%4 = rms_norm(%2, norms.0.weight, bias=norms.0.bias, dim=2, eps=1e-05): f32[2, 3, 6]  # norms.0
%5 = center(branches.0.weight, dim=0): f32[6, 6]
%6 = center(branches.0.bias, dim=0): f32[6]
%7 = linear(%4, %5, %6): f32[2, 3, 6]
%8 = mul(%7, 0.5): f32[2, 3, 6]
%9 = add(%2, %8): f32[2, 3, 6]
%10 = rms_norm(%9, norms.1.weight, bias=norms.1.bias, dim=2, eps=1e-05): f32[2, 3, 6]  # norms.1
%11 = linear(%10, out.weight, out.bias): f32[2, 3, 2]
return [%11]
""",
            rows(2, 3, 4),
        )

    def test_a_branch_that_is_not_linear(self) -> None:
        self.check(
            Stream(tap="relu"),
            """\
norms.0: applied
norms.1: uncentred_input
x: f32[3, 4]
%0 = center(enter.weight, dim=0): f32[6, 4]
%1 = center(enter.bias, dim=0): f32[6]
%2 = linear(x, %0, %1): f32[3, 6]
%3 = _log_api_usage_once(python.nn_module)
%4 = rms_norm(%2, norms.0.weight, bias=norms.0.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.0
%5 = linear(%4, branches.0.weight, branches.0.bias): f32[3, 6]
%6 = relu(%5): f32[3, 6]
%7 = add(%2, %6): f32[3, 6]
%8 = layer_norm(%7, norms.1.weight, bias=norms.1.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.1
%9 = linear(%8, out.weight, out.bias): f32[3, 2]
return [%9]
""",
        )

    def test_the_stream_is_returned(self) -> None:
        self.check(
            Stream(tap="returned"),
            """\
norms.0: observed
norms.1: observed
x: f32[3, 4]
%0 = linear(x, enter.weight, enter.bias): f32[3, 6]
%1 = _log_api_usage_once(python.nn_module)
%2 = layer_norm(%0, norms.0.weight, bias=norms.0.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.0
%3 = linear(%2, branches.0.weight, branches.0.bias): f32[3, 6]
%4 = add(%0, %3): f32[3, 6]
%5 = layer_norm(%4, norms.1.weight, bias=norms.1.bias, dim=1, eps=1e-05): f32[3, 6]  # norms.1
%6 = linear(%5, out.weight, out.bias): f32[3, 2]
return [%6, %4]
""",
        )
