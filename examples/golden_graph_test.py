"""Pin what normfx makes of a model in one's own test suite: a rewrite that no longer happens fails the test.

Run it with `python golden_graph_test.py` or pytest; EXPECTTEST_ACCEPT=1 writes the graph again. Needs `expecttest`.
"""

import unittest

import expecttest
import torch
from torch import Tensor, nn

import normfx


class Block(nn.Module):
    """A pre-norm residual block: the model under test."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), Block(8), nn.LayerNorm(8), nn.Linear(8, 20)).eval()


class TestRewrittenModel(expecttest.TestCase):
    def setUp(self) -> None:
        with torch.no_grad():
            self.report = normfx.explain(model())(torch.arange(6).reshape(2, 3))

    def test_every_norm_is_an_rms_norm(self) -> None:
        """For most suites the counts are enough: they change less often than a graph's text."""
        counts = self.report.counts
        self.assertEqual(counts["to_rms_norm"], counts["layer_norm"])
        self.assertEqual(counts["graph_breaks"], 0)

    def test_graph(self) -> None:
        """The whole graph after the rewrite; it may also change with torch's and normfx's versions."""
        self.assertExpectedInline(
            self.report.graphs[0].after,
            """\
args.0: i64[2, 3]
%0 = embedding(0.weight, args.0): f32[2, 3, 8]
%1 = center(%0, dim=2): f32[2, 3, 8]
%2 = rms_norm(%1, dim=2, eps=1e-05): f32[2, 3, 8]  # 1.norm
%3 = fold_shift(1.up.weight, 1.norm.bias, bias=1.up.bias, dim=1): f32[16]
%4 = scale_features(1.up.weight, 1.norm.weight, dim=1): f32[16, 8]
%5 = linear(%2, %4, %3): f32[2, 3, 16]
%6 = relu(%5): f32[2, 3, 16]
%7 = center(1.down.weight, dim=0): f32[8, 16]
%8 = center(1.down.bias, dim=0): f32[8]
%9 = linear(%6, %7, %8): f32[2, 3, 8]
%10 = add_rms_norm(%1, %9, dim=2, eps=1e-05): f32[2, 3, 8]  # 2
%11 = fold_shift(3.weight, 2.bias, bias=3.bias, dim=1): f32[20]
%12 = scale_features(3.weight, 2.weight, dim=1): f32[20, 8]
%13 = linear(%10, %12, %11): f32[2, 3, 20]
return [%13]
""",
        )


def main() -> None:
    unittest.main()


if __name__ == "__main__":
    main()
