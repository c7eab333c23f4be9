"""Fails a run of the default tests that costs more than eight minutes of two idle cores, and names the dearest tests.

What is counted is the processor time of the processes that run tests and of the compilers they start: on a machine
that does other things too, that is nearly what it would be on an idle one, while the time on the clock is not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

MINUTES, CORES = 8, 2
SHOWN = 20


def processor_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    return sum(os.times()[:4])


class Budget:
    """Adds up what tests cost, wherever they run; the process that was started by hand decides."""

    def __init__(self, config: pytest.Config, seconds: float = 60.0 * MINUTES * CORES) -> None:
        self.seconds = seconds
        self.worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.processes = 0.0
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        begin = processor_seconds()
        yield
        item.user_properties.append(("processor_seconds", processor_seconds() - begin))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.tests[report.nodeid] += sum(s for name, s in report.user_properties if name == "processor_seconds")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A process of pytest-xdist has ended, and has said what it cost."""
        self.processes += getattr(node, "workeroutput", {}).get("processor_seconds", 0.0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            session.config.workeroutput["processor_seconds"] = processor_seconds()  # type: ignore[attr-defined]
            return
        self.processes += processor_seconds()
        if self.passed() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def passed(self) -> bool:
        return self.processes > self.seconds

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        minutes = self.processes / 60 / CORES
        terminalreporter.write_line(f"processor time: {minutes:.1f} minutes of {CORES} cores (at most {MINUTES})")
        if self.passed():
            terminalreporter.section(f"FAILED: the default tests cost {minutes:.1f} minutes, the dearest are", "=")
            for name, seconds in self.tests.most_common(SHOWN):
                terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
