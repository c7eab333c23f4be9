"""Real classes of transformers, timm and torchvision: what is converted, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from equivalence import EagerBackend, assert_low_precision, assert_same_float64, transformed
from models import CASES, Case, named

from normfx.backend import listening
from normfx.report import GraphReport, Report

QUICK = {"gpt2", "gpt_neox parallel", "timm vit", "encoder", "whisper", "bert post-norm", "llama"}
"""The other models are `slow`."""
LOW = {"gpt2", "timm vit", "encoder"}


def _cases(quick: Collection[str]) -> pytest.MarkDecorator:
    marked = [(c, () if c.name in quick else (pytest.mark.slow,)) for c in CASES]
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name.replace(" ", "-"), marks=m) for c, m in marked])


def _assert_expected(case: Case, report: Report) -> None:
    counts = report.counts
    assert (counts["layer_norm"], counts["rms_norm"]) == (case.layer_norms, case.rms_norms)
    assert (counts["to_rms_norm"], counts.get("fold_affine", 0)) == (case.to_rms, case.folded), str(report)
    assert counts["centrings"] == case.centrings
    assert {r.code for site in report.sites for r in site.refusals} == case.codes
    assert all(site.rules or site.refusals for site in report.sites)
    assert all(
        site.name and (site.source or case.package == "torch") for site in report.sites
    )  # torch frames are hidden


@_cases(QUICK)
def test_decisions_and_float64(case: Case) -> None:
    report = assert_same_float64(case.make(), case.inputs(), promoted=case.promoted)
    _assert_expected(case, report)


@_cases(LOW)
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")],
)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    assert_low_precision(case.make(), case.batches(), EagerBackend(), dtype)


def test_training_with_dropout_is_decided_and_right() -> None:
    """GPT-2 in training with dropout 0.1: each norm is refused with M12's reason, and the same numbers are drawn."""
    pytest.importorskip("transformers")
    case = named("gpt2")
    model = case.make().double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    torch.manual_seed(3)
    expected = model(*case.inputs())
    torch.manual_seed(3)
    actual, report = transformed(model, case.inputs())
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert {r.code for site in report.sites for r in site.refusals if r.rule == "pre_rms_norm"} == {"uncentred_input"}


@pytest.mark.slow
def test_generate_token_by_token() -> None:
    """Greedy generation with a growing KV cache, compiled with dynamic shapes: the same tokens, norms converted."""
    pytest.importorskip("transformers")
    model = named("gpt2").make().double().model
    ids = torch.randint(1, 100, (2, 5), generator=torch.Generator().manual_seed(1))
    kwargs = dict(max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)
    torch._dynamo.reset()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    graphs: list[GraphReport] = []
    model.forward = torch.compile(model.forward, backend="normfx", dynamic=True, options={"strict": True})
    with listening(graphs.append):
        actual = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    assert actual.tolist() == expected.tolist() and actual.shape == (2, 13)
    assert sum(Report((g,)).counts["to_rms_norm"] for g in graphs) >= 5


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("opt", "llama", "gemma2"))]
)
def test_dynamic_lengths(name: str) -> None:
    """One graph for all lengths, the same decisions as with static shapes."""
    pytest.importorskip("transformers")
    case = named(name)
    model, backend = case.make(), EagerBackend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 12, 20):
        ids = torch.randint(1, 100, (3, tokens), generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert len(backend.graphs) == 1
    _assert_expected(case, backend.report)


def _converted(report: Report) -> set[str]:
    """The LayerNorms that became RMSNorms, by name."""
    return {s.name for s in report.sites if {"pre_rms_norm", "linear_norm"} & set(s.rules)}


@pytest.mark.slow
@_cases(())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_under_inductor(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFX_STRICT", "1")
    graphs: list[GraphReport] = []
    with listening(graphs.append):
        assert_low_precision(case.make(), case.batches(), "normfx", dtype)
    report = Report((graphs[-1],))
    if dtype == torch.float32:
        _assert_expected(case, report)
    else:  # γ is not folded into weights stored in half precision, nor are those centred for one norm alone
        wide = EagerBackend()
        with torch.no_grad():
            torch.compile(case.make(), backend=wide, fullgraph=True)(*case.inputs())
        now, then = _converted(report), _converted(wide.report)
        assert len(then) == case.to_rms and now <= then
        rounded = {s.name for s in report.sites if "rounded_weight" in {r.code for r in s.refusals}}
        assert then - now <= rounded
        assert "fold_affine" not in report.counts
