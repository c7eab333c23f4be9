"""One cell of `normfx bench kernels`: every candidate checked against float64, and those that are right timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfx.bench import rivals
from normfx.bench.clock import Call, Clock
from normfx.bench.measure import failure_text
from normfx.bench.norms import Cell, Inputs, errors, exact, wrong
from normfx.bench.rivals import OURS
from normfx.bench.timing import Quartiles, Timed, interleaved, speeds

COPY = "copy"
ROUNDS = 15
TURN = 5  # calls in a turn, the median of which counts


@dataclass
class Result:
    """What one candidate did in one cell.

    error:        the largest error of a row of any result, relative to float64
    first_call_s: seconds until the first results: compiling, and in backward the forward pass before it
    launch_us:    microseconds of a call on an idle device, its launch from Python included
    graph_us:     microseconds of a replay of its CUDA graph: the kernels alone
    gb_s:         the bytes that have to be moved over the median of graph_us
    of_copy:      the same as a part of what a device copy reaches with as many bytes, from ratios within rounds
    """

    error: float
    first_call_s: float
    launch_us: Quartiles | None = None
    graph_us: Quartiles | None = None
    gb_s: float | None = None
    of_copy: Quartiles | None = None


@dataclass
class Measured:
    """bytes:    that have to be moved
    results:  by candidate
    failures: by candidate (or "cell"), of what is wrong too: it is not timed
    lacking:  candidates that have no such norm
    copy_gb_s: of a device copy that moves as many bytes
    best:     the fastest candidate that is not normfx's, by graph_us
    speed:    how many times as fast as that one normfx's kernels are, from ratios within rounds
    """

    cell: Cell
    bytes: int
    results: dict[str, Result] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)
    copy_gb_s: float | None = None
    best: str | None = None
    speed: Quartiles | None = None


class _Judge(NamedTuple):
    """Knows the inputs and what is right."""

    cell: Cell
    inputs: Inputs
    grads: tuple[Tensor, ...]
    wanted: list[Tensor]

    @classmethod
    def of(cls, cell: Cell) -> _Judge:
        inputs = Inputs.of(cell)
        return cls(cell, inputs, tuple(g.clone() for g in inputs.grads), exact(cell, inputs))

    def restore(self) -> None:
        """The gradients that a call may have overwritten: Liger's backward writes dx into dy."""
        for grad, kept in zip(self.inputs.grads, self.grads, strict=True):
            grad.copy_(kept)

    def errors(self, call: Callable[[], Any], written: Sequence[Tensor] | None = None) -> dict[str, float]:
        """The errors of the second of two calls. The first one's results become NaN, and are the memory that the second
        one is likely to get. written: the tensors that every call writes, where these are always the same."""
        _poison(call() if written is None else written)
        self.restore()
        found = call()
        return errors(self.cell, self.inputs, found if written is None else written, self.wanted)


def _poison(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan)


def measure(
    cell: Cell, names: Sequence[str], rounds: int | None, clock: Clock | None, say: Callable[[str], None]
) -> Measured:
    """Check normfx and the rivals of these names; with a clock also time them. A failure is noted."""
    torch.compiler.reset()
    measured = Measured(cell, cell.bytes)
    with clock.running() if clock else contextlib.nullcontext(), torch.no_grad(), rivals.repeatable():
        say("float64")
        judge = _Judge.of(cell)
        calls: dict[str, Call] = {}
        for name in (*OURS, *names):
            say(f"checking {name}")
            try:
                began = time.perf_counter()
                call = rivals.call(name, cell, judge.inputs)
                if call is None:
                    measured.lacking.append(name)
                    continue
                call()
                first = time.perf_counter() - began
                found = judge.errors(call)
                if why := wrong(cell, found):
                    measured.failures[name] = why
                    continue
                measured.results[name] = Result(max(found.values()), first)
                calls[name] = call
            except Exception as error:
                measured.failures[name] = failure_text(error)
        if clock and calls:
            say("timing")
            _time(measured, calls, judge, rounds or ROUNDS, clock)
    return measured


def _time(measured: Measured, calls: dict[str, Call], judge: _Judge, rounds: int, clock: Clock) -> None:
    """Fill in what `measured` says about times."""
    cell = measured.cell
    source = torch.empty(measured.bytes // 2, dtype=torch.uint8, device=cell.device).random_()
    target = torch.empty_like(source)
    calls = {COPY: lambda: (target.copy_(source),), **calls}
    clock.before = judge.restore
    graphs: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            replay, written = clock.graph(call)
            if name != COPY and (why := wrong(cell, judge.errors(replay, written))):
                measured.failures[f"{name} graph"] = why
            else:
                graphs[name] = replay
        except Exception as error:
            measured.failures[f"{name} graph"] = failure_text(error)
    launched, replayed = _rounds(calls, rounds, clock.launched, cell), _rounds(graphs, rounds, clock.replayed, cell)
    if COPY in replayed:
        measured.copy_gb_s = _gigabytes(measured, replayed[COPY])
    for name, result in measured.results.items():
        result.launch_us = _microseconds(launched[name])
        if name in replayed:
            result.graph_us = _microseconds(replayed[name])
            result.gb_s = _gigabytes(measured, replayed[name])
            result.of_copy = speeds(replayed[COPY], replayed[name]) if COPY in replayed else None
    others = {name: statistics.median(times) for name, times in replayed.items() if name not in (COPY, *OURS)}
    if others and OURS[0] in replayed:
        measured.best = min(others, key=others.__getitem__)
        measured.speed = speeds(replayed[measured.best], replayed[OURS[0]])


def _rounds(calls: Mapping[str, Callable[[], object]], rounds: int, timed: Timed, cell: Cell) -> dict[str, list[float]]:
    """Seconds by candidate and round, after a round that is not counted."""
    repeats = dict.fromkeys(calls, TURN)
    interleaved(calls, 1, repeats, cell.device, timed)
    return interleaved(calls, rounds, repeats, cell.device, timed)


def _microseconds(times: Sequence[float]) -> Quartiles:
    return Quartiles.of([1e6 * t for t in times])


def _gigabytes(measured: Measured, times: Sequence[float]) -> float:
    return measured.bytes / statistics.median(times) / 1e9
