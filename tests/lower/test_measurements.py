"""Pairs of times that a machine is asked for once: by a few processes, those that had it to themselves."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from normfx.lower import measurements
from normfx.lower.measurements import PROCESSES, TRIES, Pair, least


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measurements, "cache_dir", lambda: str(tmp_path))


class Processes:
    """The same question by one process after another. waited: seconds that each waits for a core while it measures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.measured, self.clock = monkeypatch.setattr, 0, 0.0
        self.patch(measurements, "_seconds_waited", lambda: self.clock)

    def ask(
        self, pair: Pair = (1.0, 2.0), waited: float = 0.0, processes: int = PROCESSES, again: bool = False
    ) -> Pair:
        if not again:
            self.patch(measurements, "_known", {})
            self.patch(measurements, "_asked", set())

        def measure() -> Pair:
            self.measured += 1
            self.clock += waited
            return pair

        return least("pairs", "key", measure, processes)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def test_the_least_of_a_few_processes_counts(processes: Processes) -> None:
    """A process that measured while the machine was slow does not decide for later ones."""
    found = [processes.ask(pair) for pair in [(9.0, 1.0), (2.0, 5.0), (3.0, 4.0), (0.1, 0.1)]]
    assert found == [(9.0, 1.0), (2.0, 1.0), (2.0, 1.0), (2.0, 1.0)] and processes.measured == PROCESSES


def test_one_process_may_be_enough(processes: Processes) -> None:
    assert [processes.ask((t, 1.0), processes=1) for t in (3.0, 2.0)] == [(3.0, 1.0)] * 2


def test_who_waited_for_a_core_does_not_count(processes: Processes) -> None:
    """A pair that was measured while other programs ran is used, and measured again by the next process."""
    assert processes.ask((5.0, 9.0), waited=60.0, processes=1) == (5.0, 9.0)
    assert processes.ask((1.0, 2.0), processes=1) == (1.0, 2.0)
    assert processes.ask((0.1, 0.1), processes=1) == (1.0, 2.0) and processes.measured == 2


def test_a_process_measures_once(processes: Processes) -> None:
    processes.ask((5.0, 9.0), waited=60.0)
    assert processes.ask((1.0, 1.0), again=True) == (5.0, 9.0) and processes.measured == 1


def test_a_machine_that_is_never_quiet(processes: Processes) -> None:
    for _ in range(2 * TRIES):
        processes.ask(waited=60.0)
    assert processes.measured == TRIES


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"key": [1.0]}', '{"key": ["a", 1.0, 9, 9]}', '{"key": [1.0, 1.0, 9]}', '{"key": 1.5}']
)
def test_a_broken_file_is_measured_again(content: str, processes: Processes) -> None:
    """A file that an older version wrote counts as broken, too."""
    measurements.path("pairs").parent.mkdir(parents=True)
    measurements.path("pairs").write_text(content)
    assert processes.ask((1.0, 2.0)) == (1.0, 2.0)
    assert json.loads(measurements.path("pairs").read_text())["key"] == [1.0, 2.0, 1, 1]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell who waited")
def test_a_thread_that_waits_is_seen() -> None:
    """Runs more threads than cores, all with work that needs no interpreter lock."""

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            torch.ones(400, 400) @ torch.ones(400, 400)

    before, threads = measurements._seconds_waited(), torch.get_num_threads()
    running = [threading.Thread(target=work) for _ in range(4 * (os.cpu_count() or 1))]
    most = before
    try:
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            most = max(most, measurements._seconds_waited())
    finally:
        for thread in running:
            thread.join()
        torch.set_num_threads(threads)
    assert most > before
