"""A sampled fingerprint of tensors: sees writes that change neither a version nor an address.

Fused optimisers, `p.data.add_(…)`, NumPy views and DLPack write behind autograd's back (maths T18). Up to SAMPLES
entries of each tensor are compared bit by bit with what they were; a write that misses all of them is not seen, and
needs normfx.refold().

On the CPU the entries are read at kept addresses: the caller first makes sure that the tensors still own them. A small
C++ function does it (0.2 µs a tensor), or, where no compiler works, Python. On other devices torch reads them,
which waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger("normfx")

SAMPLES = 8

_SOURCE = r"""
#include <cstdint>
#include <cstring>

static inline uint64_t bits(const void* address, uint8_t width) {
    switch (width) {
        case 1: { uint8_t v; memcpy(&v, address, 1); return v; }
        case 2: { uint16_t v; memcpy(&v, address, 2); return v; }
        case 4: { uint32_t v; memcpy(&v, address, 4); return v; }
        default: { uint64_t v; memcpy(&v, address, 8); return v; }
    }
}

extern "C" int64_t normfx_changed(
    const void* const* addresses, const uint8_t* widths, const uint64_t* expected, int64_t count) {
    uint64_t difference = 0;
    for (int64_t i = 0; i < count; ++i) difference |= bits(addresses[i], widths[i]) ^ expected[i];
    return difference != 0;
}

extern "C" void normfx_read(const void* const* addresses, const uint8_t* widths, uint64_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = bits(addresses[i], widths[i]);
}
"""


class Fingerprint(Protocol):
    """Samples of a fixed list of tensors, which must be alive at the same addresses whenever it is asked."""

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The samples of each tensor now, as bit patterns."""

    def accept(self, samples: list[tuple[int, ...]]) -> None:
        """Compare with these samples from now on."""

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any sample differs from the accepted ones."""


def fingerprint(tensors: Sequence[Tensor]) -> Fingerprint:
    """The quickest fingerprint for these tensors."""
    if any(t.device.type != "cpu" for t in tensors):
        return _Device(tensors)
    library = _library()
    return _Python(tensors) if library is None else _Native(library, tensors)


def sample_indices(numel: int) -> list[int]:
    """Which entries of a flattened tensor are compared: one in each of SAMPLES equal stretches, columns differ."""
    if numel <= SAMPLES:
        return list(range(numel))
    stretch = numel // SAMPLES
    return [i * stretch + (i * 2654435761) % stretch for i in range(SAMPLES)]


def _addresses(tensor: Tensor) -> list[int]:
    """Addresses of the sampled entries of a strided CPU tensor."""
    base, width = tensor.data_ptr(), tensor.element_size()
    found = []
    for index in sample_indices(tensor.numel()):
        offset = 0
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            index, within = divmod(index, size)
            offset += within * stride
        found.append(base + offset * width)
    return found


def _grouped(values: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    ends, found = 0, []
    for count in counts:
        found.append(tuple(values[ends : ends + count]))
        ends += count
    return found


class _Layout:
    """Addresses and widths of all samples of a list of CPU tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups = [_addresses(t) for t in tensors]
        self.counts = [len(group) for group in groups]
        self.addresses = [address for group in groups for address in group]
        # of a complex128 entry the real half is compared
        self.widths = [min(t.element_size(), 8) for t, group in zip(tensors, groups, strict=True) for _ in group]


class _Native:
    """Reads memory in C++."""

    def __init__(self, library: ctypes.CDLL, tensors: Sequence[Tensor]) -> None:
        layout = _Layout(tensors)
        count = len(layout.addresses)
        self.counts = layout.counts
        addresses, widths = (ctypes.c_void_p * count)(*layout.addresses), (ctypes.c_uint8 * count)(*layout.widths)
        self._expected, self._scratch = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        self._arrays = addresses, widths  # the functions below hold only their addresses
        places = [ctypes.c_void_p(ctypes.addressof(array)) for array in (addresses, widths)]
        expected, scratch = (ctypes.c_void_p(ctypes.addressof(a)) for a in (self._expected, self._scratch))
        self._changed = functools.partial(library.normfx_changed, *places, expected, count)
        self._read = functools.partial(library.normfx_read, *places, scratch, count)

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        self._read()
        return _grouped(self._scratch[:], self.counts)

    def accept(self, samples: list[tuple[int, ...]]) -> None:
        self._expected[:] = [value for group in samples for value in group]

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        return bool(self._changed())


_CELLS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class _Python:
    """Reads memory through ctypes objects placed on it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        layout = _Layout(tensors)
        self.counts = layout.counts
        self._cells = [
            _CELLS[width].from_address(address) for address, width in zip(layout.addresses, layout.widths, strict=True)
        ]
        self._expected: list[int] = []

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        return _grouped([cell.value for cell in self._cells], self.counts)

    def accept(self, samples: list[tuple[int, ...]]) -> None:
        self._expected = [value for group in samples for value in group]

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        return [cell.value for cell in self._cells] != self._expected


class _Device:
    """Reads through torch, one copy to the host a device; waits for the device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._indices = [torch.tensor(sample_indices(t.numel()), dtype=torch.long, device=t.device) for t in tensors]
        self._expected: list[tuple[int, ...]] = []

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
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

    def accept(self, samples: list[tuple[int, ...]]) -> None:
        self._expected = samples

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        return self.read(tensors) != self._expected


def _bits(tensor: Tensor) -> Tensor:
    """The entries as integers; of a complex128 entry the real half."""
    if tensor.element_size() > 8:
        tensor = torch.view_as_real(tensor).select(-1, 0)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C++ functions, compiled once a machine; None where that fails."""
    from torch._inductor.codecache import CppCodeCache  # private; torch 2.11 to 2.15

    try:
        library = CppCodeCache.load(_SOURCE)
    except Exception as error:  # any compiler trouble: the Python reader does the same, slower
        log.info("no compiled fingerprint, Python reads the samples: %s", error)
        return None
    library.normfx_changed.restype = ctypes.c_int64
    library.normfx_changed.argtypes = library.normfx_read.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    return library  # type: ignore[no-any-return]
