"""What is said while models compile: torch's logs, its traces, and NORMFX_DEBUG."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import Blocks, ids

import normfx
from normfx.logs import say
from normfx.records import GraphReport, SiteReport

PLAN, GRAPH, KERNEL = "1 LayerNorm: it became an RMSNorm", "%0 = linear(args.0, 0.weight", "runs on inductor"
"""What the plan, the graphs and the kernels of PROGRAM say."""

PROGRAM = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
with torch.no_grad():
    torch.compile(model, backend="normfx", options={"fold": "live", "strict": True})(torch.ones(2, 4))
"""


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.name, record.levelname, record.getMessage()))


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> _Records:
    handler = _Records()
    logger = logging.getLogger("normfx")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    yield handler
    logger.setLevel(logging.NOTSET)  # what was decided for a level is kept by every logger until one is set


@torch.no_grad()
def test_loggers_by_level(records: _Records) -> None:
    logger = logging.getLogger("normfx")
    names = {logging.WARNING: [], logging.INFO: ["normfx.plan"]}
    names[logging.DEBUG] = ["normfx.plan", "normfx.printing", "normfx.kernels"]
    for level, expected in names.items():
        logger.setLevel(level)
        records.said.clear()
        normfx.explain(Blocks())(ids())
        assert [name for name, _, _ in records.said] == expected
    (_, info, plan), (_, debug, graphs), (_, _, kernels) = records.said
    assert (info, debug) == ("INFO", "DEBUG") and plan.startswith("3 LayerNorms: all became RMSNorms")
    assert "stages: capture " in plan and " ms" in plan.splitlines()[-1] and "store " in plan.splitlines()[-1]
    assert "layer_norm(" in graphs and "rms_norm(" in graphs and graphs.index("before:") < graphs.index("after:")
    assert "norms.0 runs on inductor" in kernels and "no kernel was generated" in kernels


@torch.no_grad()
def test_debug_is_a_ladder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each level prints what the one before does, and more."""
    said = []
    for level in "0123":
        monkeypatch.setenv("NORMFX_DEBUG", level)
        normfx.explain(Blocks())(ids())
        said.append(capsys.readouterr().out)
    assert said[0] == ""
    marks = ["3 LayerNorms: all became RMSNorms", "normfx: after\n", "no kernel was generated"]
    assert [[mark in text for mark in marks] for text in said] == [[i > j for j in range(3)] for i in range(4)]
    monkeypatch.setenv("NORMFX_DEBUG", "1")
    normfx.rewrite(torch.export.export(Blocks(), (ids(),)), {"fold": "live"})
    assert marks[0] in capsys.readouterr().out


def test_sources_of_kernels(records: _Records, capsys: pytest.CaptureFixture[str]) -> None:
    site = SiteReport("norm", "LayerNorm", (), (), "", "triton: rms_norm_8")
    say(GraphReport((site,), kernels={"rms_norm_8_forward": "def kernel(): ..."}), 3)
    out = capsys.readouterr().out
    assert "norm runs on triton: rms_norm_8" in out and "kernel rms_norm_8_forward\ndef kernel(): ..." in out
    assert "no kernel" not in out


@torch.no_grad()
def test_a_stage_that_fails_is_said(
    records: _Records, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise IndexError("no such thing")

    monkeypatch.setattr("normfx.backend.make_plan", broken)
    monkeypatch.setenv("NORMFX_DEBUG", "1")
    with pytest.warns(normfx.NormfxWarning, match="stage 'plan'"):
        normfx.explain(Blocks())(ids())
    assert "at stage 'plan' (IndexError: no such thing)" in " ".join(capsys.readouterr().out.split())


def _run(folder: Path, code: str = PROGRAM, **environ: str) -> str:
    """stderr of a process, in which TORCH_LOGS is read while torch is imported, as it is for users."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NORMFX_", "TORCH_LOGS", "TORCH_TRACE"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**kept, **environ})
    assert done.returncode == 0, done.stderr
    return done.stderr


CASES = {
    "normfx": (True, False, False),
    "+normfx": (True, True, True),
    "-normfx": (False, False, False),
    "normfx.plan": (True, False, False),
    "+normfx.printing": (False, True, False),
    "+normfx.kernels": (False, False, True),
    "dynamo,+normfx.printing,normfx.plan": (True, True, False),
    "normfx,+normfx.kernels": (True, False, True),
}
"""TORCH_LOGS → whether plan, graphs and kernels are said."""


@pytest.mark.slow
@pytest.mark.parametrize("setting", CASES)
def test_torch_logs(setting: str, tmp_path: Path) -> None:
    said = _run(tmp_path, TORCH_LOGS=setting)
    assert tuple(text in said for text in (PLAN, GRAPH, KERNEL)) == CASES[setting]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import normfx", "import normfx.explaining", "from normfx.cli import main"])
def test_torch_logs_where_normfx_is_imported_first(first: str, tmp_path: Path) -> None:
    """torch then reads TORCH_LOGS while normfx is being imported."""
    said = _run(tmp_path, f"{first}\n{PROGRAM}", TORCH_LOGS="+normfx")
    assert all(text in said for text in (PLAN, GRAPH, KERNEL))


@pytest.mark.slow
def test_trace(tmp_path: Path) -> None:
    """What tlparse keeps: each entry is a line of JSON, and after it the lines of the payload, each after a tab."""
    _run(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    (file,) = (tmp_path / "trace").iterdir()
    entries: dict[str, list[str]] = {}
    name = ""
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            entries.setdefault(name, []).append(line[1:])
        else:
            entry = json.loads(line[line.index("{") :])
            name = entry.get("artifact", {}).get("name", "")
            assert not name.startswith("normfx_") or entry["frame_id"] == entry["frame_compile_id"] == 0
    own = {name: "\n".join(lines) for name, lines in entries.items() if name.startswith("normfx_")}
    assert set(own) == {"normfx_plan", "normfx_report", "normfx_graph_before", "normfx_graph_after"}
    assert own["normfx_plan"].startswith(PLAN) and GRAPH in own["normfx_graph_before"]
    assert "rms_norm(" in own["normfx_graph_after"]
    assert json.loads(own["normfx_report"])["counts"]["to_rms_norm"] == 1
