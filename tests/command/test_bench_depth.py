"""normfx bench depth: what it measures and writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfx.bench.depth import measure
from normfx.cli import main


def test_measure() -> None:
    """Both parts of the backend's time, of a model that was compared with eager."""
    found = measure(2, 8)
    assert found.norms == 4 and found.nodes > 20
    assert {"capture", "recognize", "plan", "rewrite"} <= found.seconds.keys()
    assert found.own > 0 and found.inductor > 0


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "depth", "--layers", "1", "--width", "8", "--output", str(tmp_path)]) == 0
    assert "1 layers: normfx" in capsys.readouterr().out
    text = (tmp_path / "depth.md").read_text()
    assert "| layers | norms |" in text and "| 1 | 2 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--layers", "0"], "above 0"), (["--layers", "x"], "above 0"), (["--width", "6"], "multiple of 4")],
)
def test_bad_arguments(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "depth", *arguments, "--output", str(tmp_path / "none")])
    assert words in capsys.readouterr().err and not (tmp_path / "none").exists()
