"""Random residual networks: whatever the plan decides, outputs and gradients equal eager's in float64."""

from __future__ import annotations

import fuzz
import pytest
import torch
from equivalence import assert_same_float64
from hypothesis import HealthCheck, example, given, settings
from norm_programs import KEEP_A_MEAN
from programs import BORDERS, OBSERVERS, STREAM_OPS, Program, Step, programs, tokens
from token_programs import TOKEN_TRAPS
from weight_programs import WEIGHT_TRAPS

from normfx.report import Report

UNFOLDED = ("detach", "frozen_write", "detached_scale", "split_heads")
"""Ops whose writer cannot take a scale without moving gradients, or that spread the features over two dimensions; in
random programs they stand too."""
QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _check(steps: tuple[Step, ...], options: dict[str, str] | None = None) -> None:
    torch.manual_seed(len(steps))
    report = assert_same_float64(Program(steps).eval(), (tokens(),), options, floor=1.0)
    for site in report.sites:
        assert site.rules or site.refusals


@settings(max_examples=6, **QUIET)
@given(programs())
@example((("post_norm", 0), ("number", 0), ("branch", 0)))  # a centring between a norm and its multiple
def test_random_residual_networks(steps: tuple[Step, ...]) -> None:
    _check(steps)


def _check_compressed(steps: tuple[Step, ...]) -> None:
    basis = "orthonormal" if len(steps) % 2 else "drop"
    _check(steps, {"rules": "default,+crms_norm", "crms_basis": basis, "crms_width": "exact", "fold": "live"})


@settings(max_examples=4, **QUIET)
@given(programs())
@example((("branch", 0), ("head_write", 0), ("branch", 0)))  # a writer that reads a norm, and takes its γ
def test_random_compressed_streams(steps: tuple[Step, ...]) -> None:
    _check_compressed(steps)


@pytest.mark.slow
@settings(max_examples=200, **QUIET)
@given(programs(14))
def test_many_random_compressed_streams(steps: tuple[Step, ...]) -> None:
    _check_compressed(steps)


@pytest.mark.slow
@settings(max_examples=400, **QUIET)
@given(programs(14))
def test_many_random_residual_networks(steps: tuple[Step, ...]) -> None:
    _check(steps)


@pytest.mark.parametrize("op", BORDERS)
def test_each_step_that_dynamo_brings(op: str) -> None:
    """The canonical graph is run even where no rule applies."""
    fuzz.check_by_dynamo((("branch", 0), (op, 0), ("branch", 0)), {"fold": "live"})


@pytest.mark.slow
def test_many_programs_by_dynamo() -> None:
    """What `python tests/support/fuzz.py --dynamo` runs."""
    assert fuzz.run(0, 200, dynamo=True) == []


@pytest.mark.parametrize("op", [op for op in dict.fromkeys(STREAM_OPS) if op not in {*UNFOLDED, *KEEP_A_MEAN}])
def test_streams_pass_each_op(op: str) -> None:
    """Each op of the M3 table lets the norms around it become RMSNorms: the random test is not vacuous."""
    torch.manual_seed(0)
    steps = (("branch", 0), (op, 0), ("branch", 0))
    report = Report((fuzz.check(steps, {}),))
    assert report.counts["layer_norm"] - report.counts["to_rms_norm"] == 0


@pytest.mark.parametrize("op", [o for o in OBSERVERS if o.startswith("raw_") or o == "feature_mean"])
def test_observers_keep_the_mean(op: str) -> None:
    """LN → RMS without centring is impossible: an observed stream keeps its norms before the observer."""
    torch.manual_seed(0)
    report = Report((fuzz.check((("branch", 0), ("branch", 0), (op, 0)), {}),))
    assert any(r.code == "observed" for site in report.sites for r in site.refusals)
    assert report.counts["to_rms_norm"] < report.counts["layer_norm"]


ODD = ("deep_norm", "merged_patches")
"""Traps with a norm of their own, which may convert."""


@pytest.mark.parametrize("op", [op for op in (*TOKEN_TRAPS, *WEIGHT_TRAPS) if op not in ODD])
def test_traps_keep_the_mean(op: str) -> None:
    """What does not commute with the mean over the features ends the stream: the norm after it stays a LayerNorm."""
    report = Report((fuzz.check((("branch", 0), (op, 0)), {}),))
    refused = report.sites[-1].refusals
    assert [r.code for r in refused if r.rule == "pre_rms_norm"], report.sites[-1].rules


def test_each_setting_of_the_search() -> None:
    assert fuzz.run(0, len(fuzz.SETTINGS)) == []


@pytest.mark.slow
def test_thousands_of_random_programs() -> None:
    """As `python tests/support/fuzz.py`: each is rewritten, by default rules or compressed, and compared with eager."""
    assert fuzz.run(0, fuzz.COUNT) == []
