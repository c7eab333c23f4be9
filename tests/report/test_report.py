"""What a report says to a reader: sentences, groups, hints, graph breaks, why it is empty, colours."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import Blocks, ids
from rich.console import Console
from torch import Tensor, nn

import normfx
from normfx import backend
from normfx.backend import compiled_report
from normfx.records import FailureReport, GraphBreak, GraphReport, RefusalReport, SiteReport
from normfx.report import Report
from normfx.report_text import WIDTH, names, pattern


def _site(name: str, *rules: str, refusals: tuple[RefusalReport, ...] = ()) -> SiteReport:
    return SiteReport(name, "LayerNorm", rules, refusals, "model.py:3 in forward: x = self.norm(x)")


def _refusal(code: str = "observed", found: str = "add is read by output") -> RefusalReport:
    return RefusalReport("pre_rms_norm", code, f"its mean is read: {found}", "do not return it", (), "its mean is read")


def test_the_first_sentence_says_what_became_of_the_norms() -> None:
    sites = *(_site(f"h.{i}.norm", "pre_rms_norm", "fold_affine") for i in range(2)), _site("final")
    graph = GraphReport(sites, bytes={"pre_rms_norm": ("4,096", "2,048")}, saved={"pre_rms_norm": 2048})
    assert (
        str(Report((graph,)))
        .replace("\n", " ")
        .startswith(
            "3 LayerNorms: 2 became RMSNorms and γ and β of 2 are folded into the weights that read them; "
            "predicted to save 2.0 KiB of memory traffic per call."
        )
    )


def test_equal_blocks_are_one_entry() -> None:
    refusals = tuple(_refusal(found=f"add_{i} is read by output") for i in range(12))
    sites = tuple(_site(f"h.{i}.ln_1", refusals=(refusal,)) for i, refusal in enumerate(refusals))
    text = str(Report((GraphReport((*sites, _site("ln_f", "pre_rms_norm"))),)))
    assert text.count("pre_rms_norm refused") == 1 and "h.{0…11}.ln_1 ×12  LayerNorm" in text
    assert "found in the first: add_0 is read by output" in text
    assert "hint: do not return it" in text and "at model.py:3 in forward" in text


@pytest.mark.parametrize(
    ("given", "pattern_", "shown"),
    [
        (["h.0.ln_1", "h.1.ln_1"], "h.#.ln_1", "h.{0,1}.ln_1"),
        (["h.0.ln_1", "h.2.ln_1", "h.4.ln_1"], "h.#.ln_1", "h.{0,2,4}.ln_1"),
        (["layer_norm", "layer_norm_1"], "layer_norm#", "layer_norm … layer_norm_1"),
        (["a.0.1", "a.1.0"], "a.#.#", "a.0.1 … a.1.0"),
        (["0"], "#", "0"),
        (["norm#2"], "norm#2", "norm#2"),
    ],
)
def test_names_of_groups(given: list[str], pattern_: str, shown: str) -> None:
    assert {pattern(name) for name in given} == {pattern_} and names(given) == shown


def test_lines_are_short_and_lists_whole() -> None:
    found = ", ".join(f"dropout_{i} (an activation or graph input)" for i in range(5))
    rules = ("pre_rms_norm", "fold_scale", "fold_affine", "fuse_residual_norm")
    sites = _site("encoder.layers.0.self_attention_layer_norm", *rules), _site("n", refusals=(_refusal(found=found),))
    breaks = GraphBreak("model.py:4 in forward: " + "x + " * 40, "a cause of many words, " * 9, "a hint, " * 20)
    lines = str(Report((GraphReport(sites),), 1, (breaks,))).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "  pre_rms_norm, fold_scale, fold_affine, fuse_residual_norm" in lines
    assert "    found: dropout_0 (an activation or graph input) and 4 more" in lines


def test_what_saves_nothing_is_no_saving() -> None:
    sizes = {"pre_rms_norm": ("64", "64"), "fold_affine": ("64", "0"), "linear_norm": ("8", "16")}
    saved = {"pre_rms_norm": 0, "fold_affine": 64, "linear_norm": -8}
    text = str(Report((GraphReport((_site("norm", *sizes),), bytes=sizes, saved=saved),)))
    assert "fold_affine  64 to 0" in text and "64 to 64" not in text and "8 to 16" not in text
    assert "save 64 bytes" in text.replace("\n", " ")


def test_a_graph_that_fell_back_says_where_and_why() -> None:
    failed = GraphReport((), failure=FailureReport("plan", "IndexError: no such thing"), compile_id="0/1")
    text = str(Report((failed,)))
    assert "normfx failed on 1 graph, at stage 'plan' (IndexError: no such thing)" in text
    assert "graph 0 [0/1]" in text


def test_colours_are_for_terminals_alone() -> None:
    report = Report((GraphReport((_site("norm", refusals=(_refusal(),)),)),))
    terminal, file = (io.StringIO() for _ in range(2))
    Console(file=terminal, force_terminal=True, color_system="standard", width=100).print(report)
    Console(file=file, width=100).print(report)
    assert "\x1b[" in terminal.getvalue() and file.getvalue() == f"{report}\n" and "\x1b[" not in str(report)


def test_gradients_of_few_rows() -> None:
    report = normfx.explain(Blocks())(ids())
    text = " ".join(str(report).split())
    assert report.graphs[0].gradients and any(r.code == "live_weights" for s in report.sites for r in s.refusals)
    assert text.index("few rows") < text.index("norms.0") and "call the model under torch.no_grad()" in text
    with torch.no_grad():
        report = normfx.explain(Blocks())(ids())
    assert not report.graphs[0].gradients and "no_grad" not in str(report)


class Broken(nn.Module):
    """A stream across a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.read = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        torch._dynamo.graph_break()
        return self.read(self.norm(y))


@torch.no_grad()
def test_graph_breaks_by_place_and_what_they_cost() -> None:
    report = normfx.explain(Broken())(torch.randn(2, 8))
    (found,) = report.breaks
    assert "test_report.py" in found.place and found.place.endswith("torch._dynamo.graph_break()") and found.cause
    assert report.counts["graph_breaks"] == 1 and len(report.graphs) == 2
    (refusal,) = [r for r in report.sites[0].refusals if r.rule == "pre_rms_norm" or r.rule == "linear_norm"]
    assert "y is computed outside of this graph" in refusal.hint and "compile the whole model" in refusal.hint
    assert found.place in str(report) and json.loads(report.to_json())["breaks"][0]["cause"] == found.cause
    assert [graph.compile_id for graph in report.graphs] == ["0/0", "1/0"]
    assert all("forward" in graph.function and "test_report.py" in graph.function for graph in report.graphs)


@torch.no_grad()
def test_breaks_in_a_loop_and_the_norms_outside_of_graphs() -> None:
    report = normfx.explain(Blocks("break"))(ids())
    assert [("blocks.py" in each.place) for each in report.breaks] == [True]
    assert "at least 1 more norm, outside of the graphs" in " ".join(report.note.split())


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # torch warns of the break itself
    yield
    logging.disable(logging.NOTSET)


@torch.no_grad()
def test_a_frame_that_is_skipped_whole(quiet: None) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    report = normfx.explain(model)(torch.randn(1, 5, 8), torch.randn(1, 4, 8), tgt_mask=mask)
    assert not report.graphs and len(report.breaks) == report.counts["graph_breaks"] == 1
    assert "gave it up at a graph break" in report.note and "transformer.py" in str(report)


def test_empty_reports_say_why() -> None:
    report: Any = normfx.explain(nn.Linear)(8, 8)
    assert not report.graphs and "Linear is a class" in str(report)
    assert "traced no operation" in str(normfx.explain(lambda: 3)())
    assert "No norm was found in 1 graph." in str(normfx.explain(nn.Linear(8, 8))(torch.randn(2, 8)))
    config: Any = torch._dynamo.config
    with config.patch(disable=True):
        assert "switched off" in str(normfx.explain(nn.Linear(8, 8))(torch.randn(2, 8)))


@torch.no_grad()
def test_a_model_that_is_compiled_in_place_is_explained() -> None:
    model = Blocks()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert normfx.explain(model)(ids()).counts["to_rms_norm"] == 3
    assert compiled is not None and model._compiled_call_impl is compiled


@torch.no_grad()
def test_compiled_report_by_compile_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfx.lower.folded.compile_graph", lambda gm, inputs, patches: gm.forward)
    torch._dynamo.reset()
    assert "Nothing is compiled with normfx now" in str(compiled_report())
    first, second = Broken(), Blocks()
    held = [torch.compile(model, backend="normfx") for model in (first, second)]
    held[0](torch.randn(2, 8))
    held[1](ids())
    held[1](ids(9))
    report = compiled_report()
    assert len({graph.compile_id for graph in report.graphs}) == len(report.graphs) == 4
    frames = [graph.compile_id.partition("/")[0] for graph in report.graphs]
    assert sorted(frames.count(frame) for frame in set(frames)) == [1, 1, 2]
    assert all(f"[{graph.compile_id}] {graph.function}" in str(report) for graph in report.graphs)
    torch._dynamo.reset()
    assert not compiled_report().graphs


@torch.no_grad()
def test_blocks_compiled_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of what writes a block's input: the hint says what to do. A reset forgets what is held, too."""
    monkeypatch.setattr("normfx.lower.folded.compile_graph", lambda gm, inputs, patches: gm.forward)
    torch._dynamo.reset()

    class Block(nn.TransformerEncoderLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layers = [Block(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(2)]
    model = nn.Sequential(*layers).train()
    for block in model:
        block.compile(backend="normfx")
    model(torch.randn(2, 3, 8))
    report, held = compiled_report(), list(backend._compiled)
    refusals = [r for site in report.sites if site.name == "norm1" for r in site.refusals if r.rule == "pre_rms_norm"]
    assert refusals and all("is computed outside of this graph" in r.hint for r in refusals)
    assert all(graph.compile_id and "test_report.py" in graph.function for graph in report.graphs)
    torch._dynamo.reset()
    assert held and not compiled_report().graphs


@torch.no_grad()
def test_modules_of_torch_compiled_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo names its own wrapper there, which is no function of the user's; torch 2.11 and 2.13 trace no frame."""
    monkeypatch.setattr("normfx.lower.folded.compile_graph", lambda gm, inputs, patches: gm.forward)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True).train()
    block.compile(backend="normfx")
    block(torch.randn(2, 3, 8))
    report = compiled_report()
    assert bool(report.graphs) == bool(torch._dynamo.utils.counters["frames"])
    assert all(graph.function == "" and graph.compile_id for graph in report.graphs)


def test_explain_says_where_it_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise IndexError("no such thing")

    monkeypatch.setattr("normfx.backend.make_plan", broken)
    with pytest.warns(normfx.NormfxWarning, match="stage 'plan'"):
        report = normfx.explain(Broken().norm)(torch.randn(2, 8))
    assert report.graphs[0].failure == FailureReport("plan", "IndexError: no such thing")
    assert "at stage 'plan' (IndexError: no such thing)" in str(report)
