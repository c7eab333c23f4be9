"""Measurements of a machine, for a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from normfx.lower import measurements


def fresh_measurements(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep what is measured out of the user's cache, in a folder of its own."""
    monkeypatch.setattr(measurements, "cache_dir", lambda: str(folder))
    another_process(monkeypatch)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it is another process, which has the machine to itself."""
    monkeypatch.setattr(measurements, "_known", {})
    monkeypatch.setattr(measurements, "_asked", set())
    monkeypatch.setattr(measurements, "_seconds_waited", lambda: 0.0)
