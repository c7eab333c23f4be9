"""Is a list of tensors what it was? Identities, versions, and a sample of the entries.

The samples see writes that change neither a version nor an address: fused optimisers, `p.data.add_(…)`, NumPy views and
DLPack write behind autograd's back (maths T18). Up to SAMPLES entries of each tensor are compared bit by bit with what
they were; a write that misses all of them is not seen, and needs normfx.refold().

On the CPU a small C++ function compares everything (0.4 µs a tensor, most of it waiting for memory); where no compiler
works, Python does. On other devices torch reads the samples, which waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger("normfx")

SAMPLES = 8

storage_of = torch.Tensor.untyped_storage
pointer_of = torch.Tensor.data_ptr
address_of = attrgetter("_cdata")  # of a storage or tensor: its C++ object
version_of = attrgetter("_version")

_SOURCE = r"""
#include <c10/core/TensorImpl.h>
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

struct Source {
    const c10::TensorImpl* tensor;
    const void* storage;
    const void* pointer;
    uint64_t itemsize;
    uint64_t version;
};

// The tensors must be alive. Their memory is read only after all of them were seen to own it still.
extern "C" int64_t normfx_changed(
    const Source* sources, int64_t count,
    const void* const* addresses, const uint8_t* widths, const uint64_t* expected, int64_t samples) {
    constexpr int64_t ahead = 8;
    uint64_t difference = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (i + ahead < count) __builtin_prefetch(sources[i + ahead].storage);
        const Source& source = sources[i];
        auto* storage = source.tensor->unsafe_storage().unsafeGetStorageImpl();
        if (storage != source.storage) return 1;
        const auto* data = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
        if (data + source.tensor->storage_offset() * source.itemsize != source.pointer && data != nullptr) return 1;
        difference |= source.tensor->version_counter().current_version() ^ source.version;
    }
    if (difference != 0) return 1;
    for (int64_t i = 0; i < samples; ++i) {
        if (i + 2 * ahead < samples) __builtin_prefetch(addresses[i + 2 * ahead]);
        difference |= bits(addresses[i], widths[i]) ^ expected[i];
    }
    return difference != 0;
}

extern "C" void normfx_read(const void* const* addresses, const uint8_t* widths, uint64_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = bits(addresses[i], widths[i]);
}
"""


class Probe(Protocol):
    """Looks at a fixed list of tensors, which own the same memory whenever it is asked to read."""

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The samples of each tensor now, as bit patterns."""

    def accept(self, tensors: Sequence[Tensor], versions: list[int], samples: list[tuple[int, ...]]) -> None:
        """Compare with these from now on."""

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether anything differs from what was accepted: storage, address, version or a sample."""


def probe(tensors: Sequence[Tensor]) -> Probe:
    """The quickest probe for these tensors."""
    if any(t.device.type != "cpu" for t in tensors):
        return DeviceProbe(tensors)
    library = native_library()
    return PythonProbe(tensors) if library is None else NativeProbe(library, tensors)


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


class _Source(ctypes.Structure):
    _fields_ = (
        ("tensor", ctypes.c_void_p),
        ("storage", ctypes.c_void_p),
        ("pointer", ctypes.c_void_p),
        ("itemsize", ctypes.c_uint64),
        ("version", ctypes.c_uint64),
    )


class NativeProbe:
    """Compares in C++. The C++ objects it looks into are alive: tensors that are there now have these addresses."""

    def __init__(self, library: ctypes.PyDLL, tensors: Sequence[Tensor]) -> None:
        layout = _Layout(tensors)
        count = len(layout.addresses)
        self.counts = layout.counts
        self._library = library
        self._addresses = (ctypes.c_void_p * count)(*layout.addresses)
        self._widths = (ctypes.c_uint8 * count)(*layout.widths)
        self._accepted: tuple[list[int], Any, Any, Any] = ([], None, None, None)

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        out = (ctypes.c_uint64 * len(self._addresses))()
        self._library.normfx_read(self._addresses, self._widths, out, len(out))
        return _grouped(out[:], self.counts)

    def accept(self, tensors: Sequence[Tensor], versions: list[int], samples: list[tuple[int, ...]]) -> None:
        pairs = zip(tensors, versions, strict=True)
        found = [_Source(t._cdata, storage_of(t)._cdata, t.data_ptr(), t.element_size(), v) for t, v in pairs]
        sources = (_Source * len(found))(*found)
        expected = (ctypes.c_uint64 * len(self._addresses))(*(value for group in samples for value in group))
        places = (ctypes.c_void_p(ctypes.addressof(a)) for a in (self._addresses, self._widths, expected))
        call = functools.partial(
            self._library.normfx_changed,
            ctypes.c_void_p(ctypes.addressof(sources)),
            len(tensors),
            *places,
            len(expected),
        )
        self._accepted = [*map(address_of, tensors)], call, sources, expected

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        accepted = self._accepted  # another thread may put a new one there: this one holds the arrays being read
        return [*map(address_of, tensors)] != accepted[0] or bool(accepted[1]())


_CELLS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class _Slow(ABC):
    """Identities and versions compared in Python; how samples are read is left open."""

    def __init__(self) -> None:
        self._accepted: tuple[list[int], list[int], list[int], list[tuple[int, ...]]] = ([], [], [], [])

    @abstractmethod
    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """The samples of each tensor."""

    def accept(self, tensors: Sequence[Tensor], versions: list[int], samples: list[tuple[int, ...]]) -> None:
        pointers, storages = [*map(pointer_of, tensors)], [*map(address_of, map(storage_of, tensors))]
        self._accepted = pointers, storages, versions, samples

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        pointers, storages, versions, samples = self._accepted
        return (
            [*map(pointer_of, tensors)] != pointers
            or [*map(address_of, map(storage_of, tensors))] != storages
            or [*map(version_of, tensors)] != versions
            or self.read(tensors) != samples
        )


class PythonProbe(_Slow):
    """Reads memory through ctypes objects placed on it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        layout = _Layout(tensors)
        self.counts = layout.counts
        self._cells = [
            _CELLS[width].from_address(address) for address, width in zip(layout.addresses, layout.widths, strict=True)
        ]

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        return _grouped([cell.value for cell in self._cells], self.counts)


class DeviceProbe(_Slow):
    """Reads through torch, one copy to the host a device; waits for the device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._indices = [torch.tensor(sample_indices(t.numel()), dtype=torch.long, device=t.device) for t in tensors]

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


def _bits(tensor: Tensor) -> Tensor:
    """The entries as integers; of a complex128 entry the real half."""
    if tensor.element_size() > 8:
        tensor = torch.view_as_real(tensor).select(-1, 0)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def start_native_library() -> None:
    """Begin to compile or load the C++ function, beside Inductor's own compiling."""
    threading.Thread(target=native_library, name="normfx-probe", daemon=True).start()


_LOADING = threading.Lock()


def native_library() -> ctypes.PyDLL | None:
    """The C++ functions, compiled once a machine (2 s) and once a process loaded; None where that fails."""
    with _LOADING:
        return _load()


@functools.cache
def _load() -> ctypes.PyDLL | None:
    from torch._inductor.codecache import CppCodeCache  # private; torch 2.11 to 2.15

    try:
        # calls keep the interpreter's lock: they are short, and no other thread may free what they read
        compiled = CppCodeCache.load(_SOURCE)
        library = ctypes.PyDLL(compiled._name)
    except Exception as error:  # any compiler trouble: the Python probe does the same, slower
        log.info("no compiled probe, Python compares: %s", error)
        return None
    library.normfx_changed.restype = ctypes.c_int64
    library.normfx_changed.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    library.normfx_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library
