"""A small test of one rule in one line: a module goes in, the expected decisions and graph come out, proof included."""

from __future__ import annotations

import torch
from equivalence import assert_same_float64, transformed
from expecttest import TestCase
from torch import Tensor, nn


def rows(*shape: int) -> Tensor:
    """Rows of features with a mean of their own."""
    return torch.randn(shape or (3, 4), generator=torch.Generator().manual_seed(0)) + 0.5


def moved(model: nn.Module) -> nn.Module:
    """Biases, scales and weights away from zeros, ones and fresh values, with which a wrong fold would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


class RuleTest(TestCase):
    """rule: it alone is decided. fold: with which folds the graph is shown, kept ones without gradients."""

    maxDiff = None
    rule: str
    fold = "live"

    def check(self, model: nn.Module, expected: str, *inputs: Tensor) -> None:
        """Compare outputs and every gradient in float64, with live and with kept folds; then what the rule decided of
        each norm or computed weight, and the graph.

        EXPECTTEST_ACCEPT=1 writes the expected text: read it.
        """
        model, given = moved(model), inputs or (rows(),)
        assert_same_float64(model, given, {"rules": self.rule})  # live, and kept without gradients
        with torch.set_grad_enabled(self.fold == "live"):
            report = transformed(model, given, {"rules": self.rule, "fold": self.fold})[1]
        said = []
        for site in (*report.sites, *report.composed):
            codes = dict.fromkeys(r.code for r in site.refusals if r.rule == self.rule)
            decision = "applied" if self.rule in site.rules else ", ".join(codes) or "no site"
            said.append(f"{site.name or site.kind}: {decision}\n")
        self.assertExpectedInline("".join(said) + report.graphs[0].after, expected, skip=1)
