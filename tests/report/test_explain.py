"""normfx.explain and normfx.rewrite."""

from __future__ import annotations

import io
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_rewrite_exported_program(dynamic: bool) -> None:
    model = Blocks().double()
    shapes = {"ids": {1: torch.export.Dim("tokens", min=2, max=64)}} if dynamic else None
    program = torch.export.export(model, (ids(),), dynamic_shapes=shapes)
    text = str(program.graph)
    rewritten = normfx.rewrite(program)
    assert str(program.graph) == text
    targets = [str(n.target) for n in rewritten.graph.nodes if n.op == "call_function"]
    assert not any("layer_norm" in t or "normfx" in t for t in targets)
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")
    assert rewritten.state_dict.keys() == program.state_dict.keys()
    buffer = io.BytesIO()
    torch.export.save(rewritten, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for tokens in (6, 9) if dynamic else (6,):
        torch.testing.assert_close(loaded(ids(tokens)), model(ids(tokens)), rtol=1e-12, atol=1e-12)


def test_rewritten_program_trains_and_decomposes() -> None:
    model = Blocks().double()
    rewritten = normfx.rewrite(torch.export.export(model, (ids(),)))
    module = rewritten.module()
    module(ids()).sum().backward()
    model(ids()).sum().backward()
    grads = dict(module.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name].grad, p.grad, rtol=1e-10, atol=1e-11)
    lowered = rewritten.run_decompositions()
    torch.testing.assert_close(lowered.module()(ids()), model(ids()), rtol=1e-12, atol=1e-12)


def test_rewrite_refuses_other_things() -> None:
    with pytest.raises(normfx.ExportError, match=r"takes a torch\.export\.ExportedProgram, not Blocks"):
        normfx.rewrite(Blocks())  # type: ignore[arg-type]


def test_program_without_norms_comes_back_as_it_is() -> None:
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    assert normfx.rewrite(program) is program
