"""The report as a page: what it is drawn from, that it is whole, and that names in it stay text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Blocks, ids
from hypothesis import given
from hypothesis import strategies as st
from models import named
from pages import RUNS, hostile_report, long_report
from torch import Tensor, nn

import normfx
from normfx.cli import main
from normfx.printing.line_diff import differences
from normfx.report import Report
from normfx.report_html import FILES

VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})


class _Page(HTMLParser):
    """A page as elements and text; fails where end tags do not fit."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(data)

    @property
    def data(self) -> dict[str, object]:
        scripts = [text for text in self.inside["script"] if text.startswith("{")]
        return json.loads("".join(scripts))


def _page(report: Report, tmp_path: Path) -> _Page:
    path = tmp_path / "report.html"
    report.to_html(path)
    return _Page(path)


# ---------------------------------------------------------------- what it is drawn from


@torch.no_grad()
def test_a_pre_norm_stream_from_top_to_bottom() -> None:
    (graph,) = normfx.explain(Blocks())(ids()).graphs
    assert {step.stream for step in graph.steps} == {0}
    kinds = "".join({"writer": "w", "sum": "s", "norm": "n"}[step.kind] for step in graph.steps)
    assert re.fullmatch(r"w+s?(n(ws)?)+", kinds) and kinds.count("n") == 3
    assert [graph.sites[step.site].name for step in graph.steps if step.kind == "norm"] == [s.name for s in graph.sites]
    assert all(step.centred for step in graph.steps if step.kind != "norm")
    assert not any(step.inline for step in graph.steps)
    before, after = graph.before.splitlines(), graph.after.splitlines()
    for step in graph.steps:
        assert step.line >= 0 and f" = {step.op if step.kind != 'norm' else 'layer_norm'}(" in before[step.line]
    for site in graph.sites:
        assert [before[i].rpartition("# ")[2] for i in site.before] == [site.name]
        assert [after[i].rpartition("# ")[2] for i in site.after] == [site.name] and "rms_norm(" in after[site.after[0]]
        assert [cost.rule for cost in site.costs] == list(site.rules) and site.costs[0].norms == 3
        assert site.readers and all(reader.endswith("(linear)") for reader in site.readers)


class PostNorm(nn.Module):
    """x = LN(x + f(x)), the last of which is returned."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(blocks))
        self.writes = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, write in zip(self.norms, self.writes, strict=True):
            x = norm(x + torch.dropout(write(x), 0.1, self.training) * 0.5)
        return x


@torch.no_grad()
def test_post_norms_lie_on_their_stream() -> None:
    (graph,) = normfx.explain(PostNorm())(ids()).graphs
    assert {step.stream for step in graph.steps} == {0}
    assert [step.inline for step in graph.steps if step.kind == "norm"] == [True, False]
    writers = [(step.name, step.op) for step in graph.steps if step.kind == "writer"]
    assert writers == [("table", "embedding"), ("writes.0", "linear"), ("writes.1", "linear")]
    assert graph.sites[1].readers == ("the graph's output",) and not any(step.centred for step in graph.steps)


@torch.no_grad()
@pytest.mark.parametrize(("name", "streams"), [("llama", 1), ("vit", 1), ("encoder", 1)])
def test_streams_of_models(name: str, streams: int) -> None:
    """Also where nothing is to be proved: an RMSNorm's stream is drawn as well."""
    case = named(name)
    (graph,) = normfx.explain(case.make())(*case.inputs()).graphs
    assert len({step.stream for step in graph.steps}) == streams
    assert [step.site for step in graph.steps if step.kind == "norm"] == list(range(len(graph.sites)))
    assert sum(step.kind == "sum" for step in graph.steps) >= len(graph.sites) // 2


def test_json_has_a_version_and_carries_everything() -> None:
    report = long_report(3)
    data = json.loads(report.to_json())
    assert data["version"] == 1 and data["environment"] == {"torch": "2.14", "device": "none"}
    assert len(data["graphs"][0]["steps"]) == 10 and data["graphs"][0]["sites"][1]["readers"] == ["h.1.up (linear)"]


# ---------------------------------------------------------------- lines that differ

LINES = st.lists(st.sampled_from("aaabcdefgh"), max_size=30)


@given(LINES, LINES)
def test_differences_cover_both_texts(before: list[str], after: list[str]) -> None:
    runs = list(differences(before, after))
    assert [i for _, a, b, _, _ in runs for i in range(a, b)] == list(range(len(before)))
    assert [j for _, _, _, c, d in runs for j in range(c, d)] == list(range(len(after)))
    for kind, a, b, c, d in runs:
        assert kind == ("+" if a == b else "-" if c == d else "=" if before[a:b] == after[c:d] else "~")
    assert not any(first[0] == second[0] == "=" for first, second in pairwise(runs))


def test_long_texts_are_compared_line_by_line() -> None:
    before = [line for i in range(5000) for line in (f"norm {i}", "add", "gelu")]
    after = [line for i in range(5000) for line in (f"norm {i}", *(["scale"] if i % 2 else []), "add", "gelu")]
    runs = list(differences(before, after))
    assert [kind for kind, *_ in runs] == ["=", "+"] * 2500 + ["="]


# ---------------------------------------------------------------- the page


@torch.no_grad()
def test_a_page_is_whole(tmp_path: Path) -> None:
    report = normfx.explain(Blocks())(ids())
    page = _page(report, tmp_path)
    assert " ".join(str(report).split()).startswith(page.inside["p"][0])
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(", page.text)
    assert {attr for _, attrs in page.elements for attr in attrs}.isdisjoint({"src", "href", "onclick"} - {"href"})
    assert [attrs["href"] for _, attrs in page.elements if "href" in attrs] == ["#streams"]
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")
    anchors = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(anchors) == len(set(anchors))
    labels = {value for _, attrs in page.elements for name, value in attrs.items() if name == "aria-labelledby"}
    assert labels <= set(anchors)
    for tag, attrs in page.elements:
        assert tag not in ("input", "select", "meter") or attrs.get("aria-label")
    without_script = page.text[page.text.index("<noscript>") : page.text.index("</noscript>")]
    assert without_script.count("<tr>") == 4 and "norms.0" in without_script
    assert page.data["counts"] == report.counts and json.loads(report.to_json()).items() <= page.data.items()


def test_names_stay_text(tmp_path: Path) -> None:
    page = _page(hostile_report(), tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    graphs: Any = page.data["graphs"]
    assert RUNS in page.inside["td"] and graphs[0]["sites"][0]["name"] == RUNS


def test_empty_reports_have_pages(tmp_path: Path) -> None:
    assert "no graph was captured" in _page(Report((), note="why"), tmp_path).text
    data = _page(Report((long_report(0).graphs[0],)), tmp_path).data
    assert data["differences"] == [[["=", 0, 1, 0, 1], ["~", 1, 2, 1, 3], ["=", 2, 3, 3, 4]]]


def test_kernels_are_coloured(tmp_path: Path) -> None:
    page = _page(hostile_report(), tmp_path)
    assert ("span", {"class": "c1"}) in page.elements and ("code", {}) in page.elements


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, path = tmp_path / "factory.py", tmp_path / "page.html"
    script.write_text("from torch import nn, ones\ndef make():\n    return nn.LayerNorm(4), (ones(2, 4),)\n")
    assert main(["explain", f"{script}:make", "--html", str(path)]) == 0
    assert f"Written: {path}" in capsys.readouterr().out.replace("\n", "") and _Page(path).data["version"] == 1
    assert main(["explain", f"{script}:make", "--json", "--html", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    with pytest.raises(SystemExit):
        main(["explain", f"{script}:make", "--html", str(tmp_path)])
    assert "--html" in capsys.readouterr().err


# ---------------------------------------------------------------- colours

PAIRS = [
    ("ink", "paper"), ("ink", "panel"), ("soft", "paper"), ("soft", "panel"), ("rms", "paper"), ("rms", "rms-soft"),
    ("changed", "changed-soft"), ("kept", "kept-soft"), ("kept", "paper"), ("soft", "rms-soft"),
    ("soft", "changed-soft"), ("soft", "kept-soft"), ("ink", "minus-soft"),
    ("ink", "plus-soft"), ("ink", "mark-minus"), ("ink", "mark-plus"),
    ("word", "panel"), ("word", "minus-soft"), ("word", "plus-soft"), ("number", "minus-soft"), ("number", "plus-soft"),
    ("word", "mark-minus"), ("word", "mark-plus"), ("string", "panel"), ("soft", "minus-soft"), ("soft", "plus-soft"),
    ("minus", "minus-soft"), ("plus", "plus-soft"), ("rms", "panel"), ("rms", "changed-soft"), ("kept", "changed-soft"),
    ("kept", "rms-soft"), ("rms", "kept-soft"),
]  # fmt: skip
"""Text and what it stands on."""


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    """Text stands out by at least 4.5 to 1 (WCAG 2.2, AA), in light and in dark."""
    block = re.findall(r"^:root[^{]*\{(.*?)\}", (FILES / "page.css").read_text(), re.S | re.M)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    poor = {}
    for text, ground in PAIRS:
        dark, light = sorted((_luminance(colours[text]), _luminance(colours[ground])))
        ratio = (light + 0.05) / (dark + 0.05)
        if ratio < 4.5:
            poor[text, ground] = round(ratio, 2)
    assert poor == {}
