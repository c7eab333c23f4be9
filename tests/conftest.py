"""Every test starts with nothing compiled, its own random state and checked graphs."""

from __future__ import annotations

import pytest
import torch
from budget import Budget


def pytest_configure(config: pytest.Config) -> None:
    """The default tests have a budget; those that take minutes by nature have none."""
    # here, since pytest would import normfx to read its own configuration
    config.addinivalue_line("filterwarnings", "error::normfx.errors.NormfxWarning")
    if "not slow" in config.getoption("markexpr"):
        config.pluginmanager.register(Budget(config), "normfx-budget")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a test inherits what others compiled of the same code, and Dynamo's recompile limit."""
    monkeypatch.setenv("NORMFX_VERIFY", "1")
    torch._dynamo.reset()
    torch.manual_seed(0)
