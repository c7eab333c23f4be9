"""What differs on devices: samples of tensors, up to SAMPLES entries each, compared bit by bit; streams.

Reading them waits for the device. A write that bumps no version and misses all samples is not seen (docs/folds.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

SAMPLES = 8


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
