"""Kept folds on a device without waiting for it: a prototype that nothing uses by default.

Two kernels run before the graph, on its stream. The first compares sampled words of every parameter with those of the
last call and notes which parameters changed. The second, on as many programs as the device runs at once, returns at
once unless any did; else it computes the folds of those again, in place. Nothing is read back: the order of a stream
is what makes the graph see the new values, in a recorded CUDA graph too.

What it sees: a write of any kind that touches one of the sampled words. What it cannot: one that misses them all. So
version counters, which the host compares, still decide; `force` is for what they tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import build
from .source import Source, module

SAMPLES, SOURCES = 8, 8
"""Words compared of each parameter, and parameters that one program looks at."""

ROWS, COLUMNS = 32, 64
"""The tile of a weight that one program reads at a time; it folds COLUMNS whole columns."""

PROGRAMS = 132
"""Programs of the second kernel: one for each multiprocessor of an H100."""

FIELDS = 9
"""Numbers in a row of the table: addresses of the weight, γ (0: none) and the fold; rows, columns, first column; places
of the weight and of γ among the parameters; whether the fold is centred over rows."""

_POINTERS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, eq=False)
class Job:
    """out = P weight, where centred, times γ by columns, where there is one. All contiguous and of one dtype.

    weight, out: [features out, features in]; gamma: [features in]
    """

    weight: Tensor
    out: Tensor
    gamma: Tensor | None = None
    centred: bool = False


def check_source() -> Source:
    """Tells which parameters have a sampled word that differs from the last call's, and which programs found any."""
    lines = [
        f"first = tl.program_id(0) * {SOURCES}",
        f"place = (first + tl.arange(0, {SOURCES})[:, None]) * {SAMPLES} + tl.arange(0, {SAMPLES})[None, :]",
        f"real = place < count * {SAMPLES}",
        "address = tl.load(addresses_ptr + place, mask=real, other=0)",
        "word = tl.load(address.to(tl.pointer_type(tl.int32)), mask=real, other=0)",
        "before = tl.load(expected_ptr + place, mask=real, other=0)",
        "differs = tl.maximum(tl.max((word != before).to(tl.int32), 1), force)",
        "tl.store(expected_ptr + place, word, mask=real)",
        f"own = first + tl.arange(0, {SOURCES})",
        "tl.store(changed_ptr + own, differs, mask=own < count)",
        "tl.store(any_ptr + tl.program_id(0), tl.max(differs, 0))",
    ]
    names = ["addresses_ptr", "expected_ptr", "changed_ptr", "any_ptr", "count", "force"]
    return module("check_samples", names, 4, "Which parameters changed since the last call, by samples.", lines)


def refold_source(dtype: torch.dtype) -> Source:
    """Folds of this dtype, of the parameters that changed, a column block at a time."""
    pointer = f"tl.pointer_type(tl.{_POINTERS[dtype]})"
    lines = [
        "dirty = 0",
        "for start in range(0, checks, 64):",
        "    which = start + tl.arange(0, 64)",
        "    dirty = tl.maximum(dirty, tl.max(tl.load(any_ptr + which, mask=which < checks, other=0), 0))",
        "if dirty != 0:",
        "    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):",
        f"        row = table_ptr + tile * {FIELDS}",
        "        changed = tl.load(changed_ptr + tl.load(row + 6)) | tl.load(changed_ptr + tl.load(row + 7))",
        "        if changed != 0:",
        f"            weight = tl.load(row).to({pointer})",
        "            gamma_address = tl.load(row + 1)",
        f"            out = tl.load(row + 2).to({pointer})",
        "            rows, columns = tl.load(row + 3), tl.load(row + 4)",
        f"            col = tl.load(row + 5) + tl.arange(0, {COLUMNS})[None, :]",
        "            real = col < columns",
        f"            mean = tl.zeros([1, {COLUMNS}], tl.float32)",
        "            if tl.load(row + 8) != 0:",
        f"                total = tl.zeros([{ROWS}, {COLUMNS}], tl.float32)",
        f"                for begin in range(0, rows, {ROWS}):",
        f"                    at = begin + tl.arange(0, {ROWS})[:, None]",
        "                    block = tl.load(weight + at * columns + col, mask=(at < rows) & real, other=0.0)",
        "                    total += block.to(tl.float32)",
        "                mean = tl.sum(total, 0, keep_dims=True) / rows",
        # Triton 3.9's interpreter takes no mask that was made of one number's comparison
        "            gammas = tl.where(gamma_address != 0, columns, 0)",
        f"            gamma = tl.load(gamma_address.to({pointer}) + col, mask=col < gammas, other=1.0)",
        "            scale = gamma.to(tl.float32)",
        f"            for begin in range(0, rows, {ROWS}):",
        f"                at = begin + tl.arange(0, {ROWS})[:, None]",
        "                inside = (at < rows) & real",
        "                block = tl.load(weight + at * columns + col, mask=inside, other=0.0).to(tl.float32)",
        "                folded = ((block - mean) * scale).to(out.dtype.element_ty)",
        "                tl.store(out + at * columns + col, folded, mask=inside)",
    ]
    names = ["any_ptr", "changed_ptr", "table_ptr", "checks", "tiles"]
    return module(f"refold_{_POINTERS[dtype]}", names, 8, "Folds of parameters that changed, computed again.", lines)


class DeviceFolds:
    """Keeps folds true to their parameters by two launches a call; of one device and dtype.

    Addresses are those of construction: make a new one when a parameter or a fold moved. Raises ValueError for jobs
    that the kernels cannot do.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        parameters = list({id(t): t for job in jobs for t in (job.weight, job.gamma) if t is not None}.values())
        place = {id(t): i for i, t in enumerate(parameters)}
        for job in jobs:
            _check(job, jobs[0].weight)
        device = jobs[0].weight.device
        addresses = [a for t in parameters for a in _samples(t)]
        table = [row for job in jobs for row in _tiles(job, place)]
        self._jobs, self._count, self._tiles = tuple(jobs), len(parameters), len(table)
        self._checks = -(-len(parameters) // SOURCES)
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._table = torch.tensor(table, dtype=torch.int64, device=device)
        self._expected = torch.zeros(len(addresses), dtype=torch.int32, device=device)
        self._any, self.changed = (
            torch.zeros(n, dtype=torch.int32, device=device) for n in (self._checks, self._count)
        )
        self._fresh = True

    def refresh(self, force: bool = False) -> None:
        """Launch both kernels on the current stream. force: fold everything again, whatever the samples say."""
        dtype = self._jobs[0].weight.dtype
        first, second = check_source(), refold_source(dtype)
        looked = (self._addresses, self._expected, self.changed, self._any)
        build(first)[(self._checks,)](*looked, self._count, int(force or self._fresh), num_warps=first.warps)
        given = (self._any, self.changed, self._table, self._checks, self._tiles)
        build(second)[(min(PROGRAMS, self._tiles),)](*given, num_warps=second.warps)
        self._fresh = False


def _check(job: Job, like: Tensor) -> None:
    tensors = [t for t in (job.weight, job.out, job.gamma) if t is not None]
    if any(t.dtype != like.dtype or t.device != like.device or not t.is_contiguous() for t in tensors):
        raise ValueError("normfx kernels: folds that are refreshed together are contiguous, of one dtype and device")
    if like.dtype not in _POINTERS or job.weight.ndim != 2 or job.out.shape != job.weight.shape:
        raise ValueError(f"normfx kernels: cannot fold a weight of {like.dtype} and shape {tuple(job.weight.shape)}")
    if job.gamma is not None and job.gamma.shape != job.weight.shape[1:]:
        raise ValueError(f"normfx kernels: γ of shape {tuple(job.gamma.shape)} for a weight {tuple(job.weight.shape)}")
    if min(t.numel() * t.element_size() for t in tensors) < 4:
        raise ValueError("normfx kernels: a parameter is smaller than one word")


def _samples(tensor: Tensor) -> list[int]:
    """Addresses of SAMPLES words, one in each of as many stretches; small tensors repeat them."""
    words = tensor.numel() * tensor.element_size() // 4
    base = tensor.data_ptr() // 4 * 4  # a slice of half precision may begin in the middle of a word
    stretch = max(words // SAMPLES, 1)
    return [base + 4 * ((i * stretch + (i * 2654435761) % stretch) % words) for i in range(SAMPLES)]


def _tiles(job: Job, place: dict[int, int]) -> list[list[int]]:
    rows, columns = job.weight.shape
    gamma = job.weight if job.gamma is None else job.gamma
    address = 0 if job.gamma is None else job.gamma.data_ptr()
    head = [job.weight.data_ptr(), address, job.out.data_ptr(), rows, columns]
    tail = [place[id(job.weight)], place[id(gamma)], int(job.centred)]
    return [[*head, first, *tail] for first in range(0, columns, COLUMNS)]
