"""Says what a run of the default tests cost in processor time, and which were the most expensive; fails it on demand.

What is counted is the processor time of the processes that run tests and of the compilers they start: on a machine
that does other things too, that is near what it would be on an idle one, while the time on the clock is not. How fast
the processor is it cannot know, so only `--budget MINUTES`, for a machine that one knows, makes a run fail.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

MINUTES, CORES = 8, 2
"""What the default tests should cost, on how many cores."""

SHOWN = 20


def processor_seconds(children: bool = True) -> float:
    """The processor time of this process and all its threads; with `children`, also of its children that have ended."""
    return sum(os.times()[: 4 if children else 2])


class Budget:
    """Adds up what tests cost, wherever they run. `limit`: minutes on CORES cores that a run may cost, or None."""

    def __init__(self, config: pytest.Config, limit: float | None = None) -> None:
        self.limit = limit
        self.worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.parallel = False
        self.seconds = 0.0
        self.tests: Counter[str] = Counter()

    @property
    def minutes(self) -> float:
        return self.seconds / 60 / CORES

    @property
    def exceeded(self) -> bool:
        return self.limit is not None and self.minutes > self.limit

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
        self.parallel = True
        self.seconds += getattr(node, "workeroutput", {}).get("processor_seconds", 0.0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            session.config.workeroutput["processor_seconds"] = processor_seconds()
            return
        self.seconds += processor_seconds(children=not self.parallel)  # the workers are children, and were counted
        if self.exceeded and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.exceeded or self.minutes > MINUTES:
            what, most = ("FAILED", self.limit) if self.exceeded else ("OVER BUDGET", MINUTES)
            terminalreporter.section(f"{what}: more than {most} minutes; the most expensive, for tests/costly.txt", "=")
            for name, seconds in self.tests.most_common(SHOWN):
                terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
        terminalreporter.write_line(
            f"processor time: {self.minutes:.1f} minutes of {CORES} cores (should be at most {MINUTES})"
        )
