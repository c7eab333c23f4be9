"""Captured CUDA graphs, and times of single calls, each with nothing of its inputs in the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

FLUSH = 4
"""Times the size of the L2 cache that is read to empty it; replacement is not strictly by age."""

Call = Callable[[], tuple[Tensor, ...]]


Captured = tuple[Callable[[], object], tuple[Tensor, ...]]
"""A replay, and the tensors that each replay writes."""


def captured(call: Call, device: str) -> Captured:
    """A CUDA graph of a call, whose inputs and results stay where they are. It is made on a stream of its own, three
    calls after what has to be set up there; backward passes run on the calling thread."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.autograd.grad_mode.set_multithreading_enabled(False):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.autograd.grad_mode.set_multithreading_enabled(False), torch.cuda.graph(graph, stream=stream):
        results = call()
    return graph.replay, results


def _stream(device: str) -> torch.cuda.Stream:
    make: Callable[..., torch.cuda.Stream] = torch.cuda.Stream  # torch leaves it untyped
    return make(device)


class Clock(Protocol):
    """What `normfx.bench.contest` needs of a device; tests have one that counts instead."""

    before: Callable[[], object]

    def running(self) -> Any: ...

    def graph(self, call: Call) -> Captured: ...

    def launched(self, call: Callable[[], object], repeats: int, device: str) -> float: ...

    def replayed(self, call: Callable[[], object], repeats: int, device: str) -> float: ...


class DeviceClock:
    """before: what is to be done before a timed call, outside of its time"""

    def __init__(self, device: str) -> None:
        self.stream = _stream(device)
        self.before: Callable[[], object] = lambda: None
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._other = torch.ones(FLUSH * size // 4, device=device)
        self._total = torch.empty((), device=device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything on one stream that is not the default one: autograd runs a backward pass on the stream of its
        forward pass, and the default stream cannot be captured."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        self.stream.synchronize()

    def graph(self, call: Call) -> Captured:
        """The call has been made before: nothing is left to be compiled."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = call()
        return graph.replay, results

    def launched(self, call: Callable[[], object], repeats: int, device: str) -> float:
        """Seconds between two events around a call on an idle device: the launch, Python included, and the kernels."""
        return self._seconds(call, repeats, idle=True)

    def replayed(self, call: Callable[[], object], repeats: int, device: str) -> float:
        """Seconds of a replay, launched while the device is still busy with emptying the cache: the kernels alone."""
        return self._seconds(call, repeats, idle=False)

    def _seconds(self, call: Callable[[], object], repeats: int, idle: bool) -> float:
        """The median of the repeats."""
        event: Callable[..., Any] = torch.cuda.Event  # torch leaves it untyped
        pairs = []
        for _ in range(repeats):
            self.before()
            # read, not written: dirty lines would have to be written back in the time of the call
            torch.sum(self._other, dim=0, out=self._total)
            if idle:
                torch.cuda.synchronize()
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) / 1e3
