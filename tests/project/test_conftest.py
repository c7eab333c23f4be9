"""The environment of a test does not depend on the tests before it."""

from __future__ import annotations

import os

import pytest
from conftest import _restore


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("HELD", "1")
    monkeypatch.delenv("CXX", raising=False)
    before = dict(os.environ)
    os.environ.update(CC="gcc", CXX="gcc")
    del os.environ["HELD"]
    _restore(before)
    assert dict(os.environ) == before
