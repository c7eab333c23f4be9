"""Processes of kernel_answers.py side by side: on a device, nearly all of the time goes into compiling, on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

PROGRAM = Path(__file__).with_name("kernel_answers.py")

Process = subprocess.Popen[str]


def environment(device: str) -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}


class Processes:
    """Answers cases by `count` processes, which start when they are needed and end with this context.

    A process that fails is replaced: after an illegal access it could use the device no more, and every later case
    would fail with it.
    """

    def __init__(self, count: int, device: str) -> None:
        self.count, self.device = count, device
        self._idle: SimpleQueue[Process | None] = SimpleQueue()  # None: one that is still to be started
        for _ in range(count):
            self._idle.put(None)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *raised: object) -> None:
        for _ in range(self.count):
            _end(self._idle.get())

    def answers(self, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Yields answers in the order of the cases."""
        with ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(self._answer, cases))

    def _answer(self, case: dict[str, Any]) -> dict[str, Any]:
        process, sound = self._idle.get(), False
        try:
            process = process or self._start()
            reply = _ask(process, case)
            sound = "failure" not in reply
            return reply
        finally:
            if not sound:
                _end(process)
            self._idle.put(process if sound else None)

    def _start(self) -> Process:
        return Process(
            [sys.executable, PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(self.device),
        )


def _ask(process: Process, case: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        return {"failure": f"the process ended with status {process.wait()}"}
    reply: dict[str, Any] = json.loads(line)
    return reply


def _end(process: Process | None) -> None:
    if process is not None:
        process.kill()
        process.communicate()
