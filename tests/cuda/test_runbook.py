"""The scripts for a machine with a GPU, as far as they go without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

SCRIPTS = sorted(Path(__file__).with_name("runbook").glob("[0-9]_*.sh"))
LIMIT = 600  # seconds of a script, its start included


def ran(script: Path, folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Started elsewhere, as one does who types its path; its own Python path comes first."""
    env = {**os.environ, "OUT": str(folder / "results"), "PYTHON": python}
    return subprocess.run([script, *arguments], capture_output=True, text=True, env=env, cwd=folder)


def test_there_are_scripts() -> None:
    assert [script.name[0] for script in SCRIPTS] == ["0", "1", "2", "3", "4", "5"]
    page = (Path(__file__).parents[2] / "docs/gpu-runbook.md").read_text()
    assert all(script.name in page for script in SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_dry_run(script: Path, tmp_path: Path) -> None:
    """What needs no device passes; the device's part is named, and fits into the time."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    done = ran(script, tmp_path, "--dry-run")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this was a dry run" in lines[-1] and any(line.startswith("== passed: ") for line in lines)
    said = r"^== dry run, not run{}: .*: timeout (\d+) "
    alone, background = (
        [int(n) for n in re.findall(said.format(how), done.stdout, re.MULTILINE)] for how in ("", ", in the background")
    )
    assert alone or background
    assert sum(alone) + max(background, default=0) + 20 <= LIMIT
    assert (tmp_path / "results" / f"{script.stem}.log").read_text() == done.stdout
    if script.name.startswith("1"):
        collected = [line for line in lines if line.startswith("tests/kernels/test_gpu.py::")]
        assert len(collected) >= 60


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_fails_is_said(script: Path, tmp_path: Path) -> None:
    """Runs a Python that fails at everything."""
    done = ran(script, tmp_path, "--dry-run", python="false")
    assert done.returncode == 1
    assert ": 0 passed, " in done.stdout and "(exit status 1)" in done.stdout.splitlines()[-2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device(tmp_path: Path) -> None:
    done = ran(SCRIPTS[0], tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("== FAILED: a GPU (exit status ")


def test_unknown_argument(tmp_path: Path) -> None:
    done = ran(SCRIPTS[0], tmp_path, "--fast")
    assert done.returncode == 2 and "usage: " in done.stderr
