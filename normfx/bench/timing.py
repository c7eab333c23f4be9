"""Times of calls that take turns, and errors against an exact result."""

from __future__ import annotations

import gc
import math
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

    In a round every call has its turn (of `repeats` calls), each round beginning with another one: what slows the
    machine, or follows a certain neighbour, meets all of them. Rounds pair up: ratios are to be taken within a round.
    """
    timed = timed or seconds
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # so that collecting between rounds takes no time
    try:
        for turn in range(rounds):
            gc.collect()
            first = turn % len(names)
            for name in names[first:] + names[:first]:
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


def speeds(base: Sequence[float], own: Sequence[float]) -> Quartiles:
    """How many times as fast as the base, from the ratios within rounds."""
    return Quartiles.of([b / o for b, o in zip(base, own, strict=True)])


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the exact tensors, all of them as one vector."""
    wrong = sum(float((a.double() - e).square().sum()) for a, e in zip(actual, exact, strict=True))
    return math.sqrt(wrong / sum(float(e.square().sum()) for e in exact))
