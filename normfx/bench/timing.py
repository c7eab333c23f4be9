"""Times of calls that take turns, and errors against an exact result."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Quartiles(NamedTuple):
    """Lower quartile, median, upper quartile."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


IDLE = 0.05
"""The part of one core below which this process does nothing."""

LONGEST_WAIT = 0.5
"""Seconds after which a turn begins even if threads of this process still run."""

Timed = Callable[[Callable[[], object], int, str], float]
"""A call, how often to make it, on which device → seconds of one."""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: Mapping[str, int] | None = None,
    device: str = "cpu",
    timed: Timed | None = None,
) -> dict[str, list[float]]:
    """Seconds a call takes, round by round, as `timed` (by default `seconds`) says.

    In a round every call has its turn (of `repeats` calls), in an order drawn for each round: what slows the machine,
    or follows a certain neighbour, meets all of them. Rounds pair up: ratios are to be taken within a round. On the CPU
    a turn begins with a call that is not timed, made when no thread of the turn before runs any more.
    """
    timed = timed or seconds
    names = list(calls)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # so that collecting between rounds takes no time
    try:
        for _ in range(rounds):
            gc.collect()
            for name in order.sample(names, len(names)):
                if torch.device(device).type == "cpu":
                    wait_until_idle()
                    calls[name]()
                times[name].append(timed(calls[name], repeats[name] if repeats else 1, device))
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return times


def seconds(call: Callable[[], object], repeats: int = 1, device: str = "cpu") -> float:
    """Seconds of one call, the mean of `repeats`; on CUDA between two events, nothing else under way."""
    if torch.device(device).type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats
    event: Callable[..., Any] = torch.cuda.Event  # torch leaves it untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def wait_until_idle() -> None:
    """Return when no thread of this process runs, or after LONGEST_WAIT.

    The threads of a pool run on for a while after its work, in case more comes: those of ONNX Runtime for 35 ms on each
    core, of OpenMP for some 5. The call that is timed next would have that much less of the machine.
    """
    end = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < end:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(0.005)
        if time.process_time() - used < IDLE * (time.perf_counter() - begin):
            return


def speeds(base: Sequence[float], own: Sequence[float]) -> Quartiles:
    """How many times as fast as the base, from the ratios within rounds."""
    return Quartiles.of([b / o for b, o in zip(base, own, strict=True)])


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact tensors, all of them as one vector."""
    wrong = sum(float((a.double() - e).square().sum()) for a, e in zip(actual, exact, strict=True))
    return math.sqrt(wrong / sum(float(e.square().sum()) for e in exact))
