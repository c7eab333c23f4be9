"""The list of costly tests names tests that exist."""

from __future__ import annotations

import re

import pytest
from conftest import COLLECTED, COSTLY
from paths import ROOT


def test_costly_tests_exist(pytestconfig: pytest.Config) -> None:
    """Compares functions with the files, and parameters with the tests that were collected of a function."""
    collected = pytestconfig.stash[COLLECTED]
    functions = {name.split("[")[0] for name in collected}
    lines = [line for line in (ROOT / COSTLY).read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines))
    for line in lines:
        path, *_, name = line.split("[")[0].split("::")
        assert re.search(rf"def {name}\(", (ROOT / path).read_text()), line
        assert line in collected or line.split("[")[0] not in functions, line
