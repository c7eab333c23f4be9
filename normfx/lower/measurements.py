"""Numbers measured on this machine, kept for other processes in Inductor's cache folder.

A file belongs to the processor, the number of threads and the version of torch, and holds one JSON object.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normfx.compat.inductor import cache_dir

LOCK = threading.RLock()
"""Held from reading a file to writing it."""
os.register_at_fork(after_in_child=lambda: globals().update(LOCK=threading.RLock()))

_known: dict[Path, dict[str, Any]] = {}

_asked: set[tuple[Path, str]] = set()
"""The questions that this process has answered by a measurement of its own."""

PROCESSES = 3
"""So many processes measure a pair of times, and the least of each counts: other programs that run on the same cores
while one process measures would else decide for all later ones."""

WAITED = 0.1
"""The part of a measurement for which a thread of this process may wait for a core; beyond it other programs decide."""

TRIES = 9
"""Processes that measure a pair at most, on a machine that is never quiet."""

Pair = tuple[float, float]


def path(name: str) -> Path:
    machine = (platform.processor(), processor(), torch.__version__, torch.get_num_threads())
    return Path(cache_dir()) / "normfx" / f"{name}-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"


@functools.cache
def processor() -> str:
    """The model and the instruction sets of the processor, as far as torch and the system tell."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return capability
    return capability + next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")


def read(name: str) -> dict[str, Any]:
    """What this machine's file of that name holds; empty where there is none that can be read."""
    file = path(name)
    if file not in _known:
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            found = {}
        _known[file] = found if isinstance(found, dict) else {}
    return _known[file]


def write(name: str, known: dict[str, Any]) -> None:
    """Replace the file as a whole; a folder that cannot be written to costs the next process its own measurement."""
    target = path(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, target)
    except OSError:
        return


def least(name: str, key: str, measure: Callable[[], Pair], processes: int = PROCESSES) -> Pair:
    """A pair of times in seconds: the least that this process and earlier ones measured.

    A process measures once. After so many `processes` that had the machine to themselves, no further one measures.
    """
    with LOCK:
        known, asked = read(name), (path(name), key)
        match known.get(key):
            case [float(one), float(other), int(quiet), int(tries)]:
                before = (one, other)
            case _:
                before, quiet, tries = (float("inf"), float("inf")), 0, 0
        if quiet >= processes or tries >= TRIES or (tries and asked in _asked):
            return before
        _asked.add(asked)
        begin, waited = time.perf_counter(), _seconds_waited()
        now = measure()
        alone = _seconds_waited() - waited <= WAITED * (time.perf_counter() - begin)
        found = (min(before[0], now[0]), min(before[1], now[1]))
        known[key] = [*found, quiet + alone, tries + 1]
        write(name, known)
        return found


def _seconds_waited() -> float:
    """Return how long threads of this process waited for a core, in seconds; 0 where the system does not tell."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(file.read_text().split()[1])
        except (OSError, ValueError, IndexError):
            continue  # the thread has ended
    return nanoseconds / 1e9
