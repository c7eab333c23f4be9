"""Every test starts with nothing compiled, its own random state and checked graphs."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping

import pytest
import torch
from budget import Budget
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame

BEGIN = time.monotonic()

COSTLY = "tests/costly.txt"

COLLECTED = pytest.StashKey[frozenset[str]]()
"""The names of all tests that were collected, before markers choose."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, help="minutes of two cores that the default tests may cost")
    parser.addoption("--deadline", type=float, help="seconds after which no further test is begun, but skipped")
    parser.addoption("--order", metavar="WORD", help="run the tests in an order that this word decides")


def pytest_configure(config: pytest.Config) -> None:
    """What the default tests cost is said; of those that take minutes by nature it is not."""
    # here, since pytest would import normfx to read its own configuration
    config.addinivalue_line("filterwarnings", "error::normfx.errors.NormfxWarning")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Named(config), "normfx-named")
    if "not slow" in config.getoption("markexpr"):
        config.pluginmanager.register(Budget(config, config.getoption("budget")), "normfx-budget")


class Named:
    """Names what fails when it fails: a run that is stopped before its end would not."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.config.get_terminal_writer().line(f"\nfailed: {report.nodeid} ({report.when})")


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark costly tests slow, and order tests by a word: a deadline would else leave out the same ones every time."""
    config.stash[COLLECTED] = frozenset(item.nodeid for item in items)
    costly = frozenset((config.rootpath / COSTLY).read_text().splitlines())
    for item in items:
        if item.nodeid in costly:
            item.add_marker("slow")
    word = config.getoption("order")
    if word is not None:
        items.sort(key=lambda item: hashlib.sha256(f"{word} {item.nodeid}".encode()).digest())


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption("deadline")
    if deadline is not None and time.monotonic() - BEGIN > deadline:
        pytest.skip("no time was left for it")


def _restore(environment: Mapping[str, str]) -> None:
    """Take back what a library wrote into the environment: peft leaves CXX=gcc where its BOFT fails to build."""
    changed = {name for name in os.environ.keys() | environment if os.environ.get(name) != environment.get(name)}
    for name in changed:
        if name in environment:
            os.environ[name] = environment[name]
        elif not name.startswith("_"):  # what Inductor hands to the code it compiles in this process
            del os.environ[name]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Else a test inherits what others compiled of the same code, and Dynamo's recompile limit."""
    monkeypatch.setenv("NORMFX_VERIFY", "1")
    # the same folds on every kernel: where it does not help to watch the memory, contents are compared
    monkeypatch.setattr("normfx.weights.kept.watches_pages", lambda: True)
    # else only the first test of a process that may be warned is, whichever that is
    monkeypatch.setattr("normfx.options._warned", set())
    torch._dynamo.reset()
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    _restore(environment)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # of an example that needed one
    left = get_eval_frame_callback()
    if left is not None:
        set_eval_frame(None)
        # seen once in many runs, and not the fault of the test it happens in: later tests would not run eagerly
        warnings.warn(f"Dynamo was left compiling every frame of this thread, with {left}", stacklevel=1)


@pytest.fixture(params=["pages", "contents"])
def library(request: pytest.FixtureRequest) -> Iterator[object]:
    """The C++ functions, with the kernel's help where there is any, and without."""
    from normfx.weights import native  # not with pytest itself, which measures coverage only from here on

    found = native.native_library()
    assert found is not None
    found.normfx_allow_pages(request.param == "pages")
    yield found
    found.normfx_allow_pages(1)
