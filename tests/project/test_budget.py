"""The list of costly tests names tests that exist."""

from __future__ import annotations

import re

from conftest import COSTLY
from paths import ROOT


def test_costly_tests_exist() -> None:
    lines = [line for line in (ROOT / COSTLY).read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines))
    for line in lines:
        path, *_, name = line.split("[")[0].split("::")
        assert re.search(rf"def {name}\(", (ROOT / path).read_text()), line
