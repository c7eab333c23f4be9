"""The cost model of kernels against the floors of a norm (bytes, N rows of d entries of s bytes)."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from normfx.kernels.cost import backward_cost, forward_cost
from normfx.kernels.spec import Spec

N, P = sympy.symbols("N P", integer=True, positive=True)
d, s = 768, 2


def spec(**other: Any) -> Spec:
    return Spec(**{"width": d, "centre": False, "x": "bfloat16", "out": "bfloat16", **other})


ADDED = {"residual": "bfloat16", "sum": "bfloat16"}


@pytest.mark.parametrize(
    ("given", "forward", "backward"),
    [
        ({}, 2 * N * d * s, 3 * N * d * s + 4 * N),
        ({"centre": True}, 2 * N * d * s, 3 * N * d * s + 8 * N),
        (ADDED, 4 * N * d * s, 4 * N * d * s + 4 * N),
        ({"compressed": True}, 2 * N * (d - 1) * s, 3 * N * (d - 1) * s + 4 * N),
        ({"weight": "float32"}, 2 * N * d * s + 4 * d, 3 * N * d * s + 4 * N + 8 * d + 8 * P * d),
        ({"out": "float32"}, N * d * (s + 4), N * d * (2 * s + 4) + 4 * N),
    ],
    ids=str,
)
def test_floors(given: dict[str, Any], forward: sympy.Expr, backward: sympy.Expr) -> None:
    one = spec(**given)
    assert sympy.expand(forward_cost(one, N, statistics=False).bytes - forward) == 0
    assert sympy.expand(backward_cost(one, N, one.sum is not None, P).bytes - backward) == 0


def test_statistics_are_one_or_two_numbers_a_row() -> None:
    for centre, bytes_of_row in ((False, 4), (True, 8)):
        kept, none = (forward_cost(spec(centre=centre), N, statistics).written for statistics in (True, False))
        assert sympy.expand(kept - none) == bytes_of_row * N


def test_an_rms_norm_has_less_to_compute() -> None:
    plain, norm = spec(), spec(centre=True, weight="float32", bias="float32")
    assert sympy.expand(forward_cost(norm, N, True).operations - forward_cost(plain, N, True).operations) == 4 * N * d
    assert (backward_cost(norm, N, False, P).operations - backward_cost(plain, N, False, P).operations).subs(N, 1) > 0
