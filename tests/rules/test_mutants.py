"""A rule whose guard, rewriting or fold does nothing fails its own tests (tests/rules/mutants.py has finer changes)."""

from __future__ import annotations

from typing import Any

import pytest
from mutants import killer, mutants

from normfx.rules import RULES
from normfx.rules.rule import Rule


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_mutant_is_killed(rule: Rule[Any]) -> None:
    found = list(mutants(rule, coarse=True))
    assert found
    for mutant in found:
        assert killer(mutant), f"{mutant.function} {mutant.change}"
