"""normfx.explain: what would become of a model, without compiling it."""

from __future__ import annotations

import json

import pytest
import torch
from blocks import Blocks, ids

import normfx


@torch.no_grad()
def test_explain_runs_eagerly_and_reports_every_norm() -> None:
    model = Blocks()
    report = normfx.explain(model)(ids())
    assert report.counts["layer_norm"] == report.counts["to_rms_norm"] == 3
    assert report.counts["graphs"] == 1 and report.counts["graph_breaks"] == 0
    assert [site.name for site in report.sites] == ["norms.0", "norms.1", "final"]
    assert all(site.kind == "LayerNorm" and site.rules[:2] == ("pre_rms_norm", "fold_affine") for site in report.sites)
    assert ["fuse_residual_norm" in site.rules for site in report.sites] == [False, True, True]
    assert all("blocks.py" in site.source for site in report.sites)
    (graph,) = report.graphs
    assert graph.before.startswith("ids: i64[2, 6]\n%0 = embedding(table.weight, ids)")
    assert "layer_norm(" in graph.before and "layer_norm(" not in graph.after and "rms_norm(" in graph.after


@torch.no_grad()
def test_explain_again_and_again() -> None:
    """Earlier compilations of the same code never use up its recompile limit."""
    for width in range(8, 32, 2):
        assert normfx.explain(Blocks(width=width))(ids()).counts["to_rms_norm"] == 3


def test_explain_counts_graph_breaks() -> None:
    report = normfx.explain(Blocks("break"))(ids())
    assert report.counts["graph_breaks"] >= 1 and report.counts["graphs"] == len(report.graphs) > 1


@torch.no_grad()
def test_explain_takes_options_and_compiled_models() -> None:
    options = {"rules": "-fold_affine,-fuse_residual_norm"}
    report = normfx.explain(torch.compile(Blocks(), backend="eager"), options)(ids())
    assert all(site.rules == ("pre_rms_norm",) for site in report.sites)
    assert {r.code for site in report.sites for r in site.refusals} == {"disabled"}
    with pytest.raises(normfx.OptionError):
        normfx.explain(Blocks(), {"fold": "x"})


def test_report_forms() -> None:
    report = normfx.explain(Blocks())(ids())
    data = json.loads(report.to_json())
    assert data["counts"] == report.counts and len(data["graphs"][0]["sites"]) == 3
    text = str(report)
    assert "norms.1" in text and "0x" not in text
