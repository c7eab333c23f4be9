"""What differs on devices: contents are compared by version counters and, now and then, by samples; streams.

Samples are up to SAMPLES entries of each tensor, compared bit by bit. Reading them waits for the device, so they are
not read in each call. docs/folds.md says which writes are not seen, or not at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from normfx.compat.tensors import version_of
from normfx.errors import NormfxWarning

SAMPLES = 8

EVERY = 64
"""Samples are compared in calls 1, 2, 4, 8, … after they were accepted, and from then on in every EVERY-th one."""


class Samples:
    """Reads the samples of a fixed list of tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._indices = [torch.tensor(sample_indices(t.numel()), dtype=torch.long, device=t.device) for t in tensors]

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The samples of each tensor now, as bit patterns: one copy to the host per device."""
        with torch.inference_mode(False), torch.no_grad():
            taken = [torch.take(_bits(t.detach()), i) for t, i in zip(tensors, self._indices, strict=True)]
            groups: dict[torch.device, list[int]] = {}
            for k, t in enumerate(taken):
                groups.setdefault(t.device, []).append(k)
            found: list[tuple[int, ...]] = [()] * len(taken)
            for members in groups.values():
                flat = torch.cat([taken[k].long() for k in members]).tolist()
                for k, values in zip(members, _grouped(flat, [taken[k].numel() for k in members]), strict=True):
                    found[k] = values
        return found


class Contents:
    """Tells whether tensors on devices, always the same ones, have changed; most calls do not wait for the devices."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._samples = Samples(tensors)
        self._calls = 0

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
        """The version and the samples of each tensor now. Waits for the devices."""
        self._calls = 0
        return list(zip(map(version_of, tensors), self._samples.read(tensors), strict=True))

    def changed(self, tensors: Sequence[Tensor], seen: Sequence[tuple[int, tuple[int, ...]]]) -> bool:
        """Whether a version differs from what was read, or, in the calls in which they are compared, a sample.

        Warns when only samples differ: earlier calls may have missed that write.
        """
        if any(version_of(t) != before for t, (before, _) in zip(tensors, seen, strict=True)):
            return True
        self._calls += 1
        if self._calls % EVERY and self._calls & (self._calls - 1):
            return False
        if self._samples.read(tensors) == [samples for _, samples in seen]:
            return False
        self._calls = 0  # a warning may be an error: then the next call must look again
        warnings.warn(LATE, NormfxWarning, stacklevel=2)
        return True


LATE = (
    "normfx: parameters on a device were written in a way that no version counter shows (p.data, DLPack, a collective, "
    f"a compiled fused optimizer). Up to {EVERY} calls may have used the old folded weights. Call normfx.refold() "
    "after such a write, or use options={'fold': 'live'}"
)


def is_recording() -> bool:
    """Whether a CUDA graph is being recorded: nothing can be read back, and what is recorded is repeated unchecked, so
    folds must be computed in it.
    """
    initialised: Callable[[], bool] = torch.cuda.is_initialized  # torch leaves it untyped
    return initialised() and torch.cuda.is_current_stream_capturing()


def wait_for(devices: Iterable[torch.device]) -> None:
    """Until all streams of these devices are done with what they were given."""
    for device in devices:
        torch.accelerator.synchronize(device)


def sample_indices(numel: int) -> list[int]:
    """Which entries of a flattened tensor are compared: one in each of SAMPLES equal stretches, columns differ."""
    if numel <= SAMPLES:
        return list(range(numel))
    stretch = numel // SAMPLES
    return [i * stretch + (i * 2654435761) % stretch for i in range(SAMPLES)]


def _grouped(values: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    ends, found = 0, []
    for count in counts:
        found.append(tuple(values[ends : ends + count]))
        ends += count
    return found


def _bits(tensor: Tensor) -> Tensor:
    """The entries as integers; of a complex128 entry the real half."""
    if tensor.element_size() > 8:
        tensor = torch.view_as_real(tensor).select(-1, 0)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
