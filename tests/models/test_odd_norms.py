"""Norms in every form that users write, next to what rules look for: the same function, whatever was decided."""

from __future__ import annotations

import pytest
import torch
from equivalence import assert_same_float64, outputs_and_grads
from odd_norms import net

COUNT = 400
"""Models of the slow test."""


def _check(seed: int, rules: str) -> None:
    model, inputs = net(seed)
    outputs, grads = outputs_and_grads(model, model, inputs)
    if all(torch.isfinite(t).all() for t in (*outputs, *(g for g in grads.values() if g is not None))):
        # a norm of a norm has gradients that cancel: they are compared at the scale of the largest
        assert_same_float64(model, inputs, {"rules": rules}, tolerance=1e-9, floor=1e-2)


@pytest.mark.parametrize("seed", range(8))
def test_a_few(seed: int) -> None:
    _check(seed, "all")


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["default", "all"])
def test_hundreds(rules: str) -> None:
    for seed in range(COUNT):
        try:
            _check(seed, rules)
        except Exception as error:
            error.add_note(f"model {seed} of tests/support/odd_norms.py")
            raise
