"""Detects whether a list of tensors is what it was: the same memory, read in the same layout, with the same contents.

On the CPU the contents are watched exactly (memory.cpp), whatever writes them. On other devices versions are compared,
and now and then samples (samples.py), which a write through `.data` can escape.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef  # private in name only; torch 2.11 to 2.15

from normfx.compat.tensors import is_functorch_wrapped, storage_key
from normfx.weights.native import native_library
from normfx.weights.samples import Contents

# torch leaves this one untyped
weak_reference: Callable[[torch.UntypedStorage], Any] = StorageWeakRef

storage_of = torch.Tensor.untyped_storage
address_of = attrgetter("_cdata")  # of a storage or tensor: its C++ object

Stamp = tuple[Any, ...]
"""What a source was when it was looked at. Equal stamps stand for equal contents."""


class Identity(NamedTuple):
    """Which memory a tensor reads, and how. Never used again while a StorageWeakRef on the storage is held."""

    storage: int
    base: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool
    negative: bool


def identity(tensor: Tensor) -> Identity:
    storage = storage_of(tensor)
    layout = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return Identity(storage_key(storage), storage.data_ptr(), tensor.data_ptr(), *layout)


class Watch:
    """Compares tensors with those it was made for, and with what they were when they were last accepted.

    identities: of the tensors
    trackable:  whether anything can be believed. Not without a C++ compiler, nor of tensors on a device that were made
                under inference_mode and have no version
    on_deleted: called once the memory of all of the tensors was freed
    """

    on_deleted: Callable[[], None] | None = None

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = {storage_key(storage): storage for storage in map(storage_of, tensors)}
        self.identities = tuple(map(identity, tensors))
        self.references = {address: weak_reference(storage) for address, storage in storages.items()}
        self._bases = {address: storage.data_ptr() for address, storage in storages.items()}
        self._near = [i for i, t in enumerate(tensors) if t.device.type == "cpu"]
        self._far = [i for i, t in enumerate(tensors) if t.device.type != "cpu"]
        self._memory = _memory([tensors[i] for i in self._near])
        self._contents = Contents([tensors[i] for i in self._far])
        self._accepted: _Accepted | None = None
        self.trackable = self._memory is not None and not any(tensors[i].is_inference() for i in self._far)
        self._living = len(storages)
        # they go with the watch: weakref.finalize would keep one for each watch until the storage dies
        died = functools.partial(_storage_died, weakref.ref(self))
        self._deaths = [weakref.ref(storage, died) for storage in storages.values()]

    @property
    def expired(self) -> bool:
        """Whether the memory of any of the tensors was freed, so that no caller can pass all of them again."""
        return any(reference.expired() for reference in self.references.values())

    def moved(self, other: Watch) -> bool:
        """Whether `other`, made later, has a storage of this one at another address: it was freed, and filled again."""
        return any(other._bases.get(storage, base) != base for storage, base in self._bases.items())

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether anything differs from what was accepted: memory, layout, or contents."""
        accepted = self._accepted  # another thread may put a new one there: this one holds the arrays being read
        if accepted is None:
            return True
        near = tuple(tensors[i] for i in self._near) if self._far else tuple(tensors)
        return accepted.memory_changed(near) or (bool(self._far) and self._far_changed(tensors, accepted.far))

    def read(self, tensors: Sequence[Tensor]) -> list[Stamp]:
        """The stamps of the tensors now. Read before anything is computed from them, so that a later write shows."""
        stamps: list[Stamp] = [()] * len(tensors)
        if self.trackable and self._memory is not None:
            for i, epoch in zip(self._near, self._memory.read([tensors[i] for i in self._near]), strict=True):
                stamps[i] = (epoch or object(),)  # what cannot be read is not equal to anything
            for i, stamp in zip(self._far, self._read_far(tensors), strict=True):
                stamps[i] = stamp
        return stamps

    def accept(self, tensors: Sequence[Tensor], stamps: Sequence[Stamp]) -> None:
        """Compare with this from now on. Only after all that depends on it is up to date: other threads look."""
        if self.trackable and self._memory is not None:
            epochs = [stamps[i][0] for i in self._near]
            changed = self._memory.comparison([epoch if isinstance(epoch, int) else 0 for epoch in epochs])
            self._accepted = _Accepted(changed, [stamps[i] for i in self._far])

    def forget(self) -> None:
        """Believe nothing until the next `accept`."""
        self._accepted = None

    def _far_changed(self, tensors: Sequence[Tensor], accepted: Sequence[Stamp]) -> bool:
        far = [tensors[i] for i in self._far]
        return self._far_moved(far) or not all(accepted) or self._contents.changed(far, accepted)

    def _read_far(self, tensors: Sequence[Tensor]) -> list[Stamp]:
        far = [tensors[i] for i in self._far]
        return [()] * len(far) if self._far_moved(far) else list(self._contents.read(far))

    def _far_moved(self, far: Sequence[Tensor]) -> bool:
        return [*map(identity, far)] != [self.identities[i] for i in self._far]


def _storage_died(watch: weakref.ref[Watch], storage: object) -> None:
    found = watch()
    if found is not None:
        found._living -= 1
        if not found._living and found.on_deleted is not None:
            found.on_deleted()


class _Accepted(NamedTuple):
    """What a watch compares with: contents on the CPU, stamps of the others."""

    memory_changed: Callable[[tuple[Tensor, ...]], bool]
    far: list[Stamp]


class _Memory:
    """The CPU tensors of a watch, in C++."""

    def __init__(self, library: ctypes.PyDLL, tensors: Sequence[Tensor]) -> None:
        self._library, self._count = library, len(tensors)
        flags = ctypes.c_uint8 * len(tensors)
        widths, shared = (flags(*map(read, tensors)) for read in (Tensor.element_size, _is_written_by_devices))
        self._handle = ctypes.c_void_p(library.normfx_watch(_pointers(tensors), widths, shared, len(tensors)))
        weakref.finalize(self, library.normfx_unwatch, self._handle).atexit = False

    def read(self, tensors: Sequence[Tensor]) -> list[int]:
        epochs = (ctypes.c_uint64 * self._count)()
        self._library.normfx_read(self._handle, _pointers(tensors), epochs)
        return epochs[:]

    def comparison(self, epochs: Sequence[int]) -> Callable[[tuple[Tensor, ...]], bool]:
        """A function that tells whether tensors differ from those that are watched, and from what they were then."""
        known = (ctypes.c_uint64 * self._count)(*epochs)
        compare, handle, place = self._library.normfx_changed, self._handle, ctypes.c_void_p(ctypes.addressof(known))
        payload = _payload()

        def changed(tensors: tuple[Tensor, ...], kept: Any = (self, known)) -> bool:
            return bool(compare(handle, id(tensors) + _ITEMS, payload, place))

        def changed_by_addresses(tensors: tuple[Tensor, ...], kept: Any = (self, known)) -> bool:
            addresses = [ctypes.c_void_p(address_of(t)) for t in tensors]
            objects = (ctypes.c_void_p * len(tensors))(*map(ctypes.addressof, addresses))
            return bool(compare(handle, objects, 0, place))

        return changed_by_addresses if payload is None else changed


_ITEMS = tuple.__basicsize__
"""Where in a tuple the addresses of its elements begin, in CPython."""


@functools.cache
def _payload() -> int | None:
    """Where in Python's tensors the address of the C++ tensor is, found by looking; None if it is not found."""
    looked_at = [torch.empty(1), torch.empty(2), torch.nn.Parameter(torch.empty(3))]
    word = ctypes.sizeof(ctypes.c_void_p)

    def held(tensor: Tensor, place: int) -> int | None:
        return ctypes.c_void_p.from_address(id(tensor) + place).value

    places = range(0, Tensor.__basicsize__, word)
    return next((p for p in places if all(held(t, p) == address_of(t) for t in looked_at)), None)


def _memory(tensors: Sequence[Tensor]) -> _Memory | None:
    library = native_library()
    return None if library is None else _Memory(library, tensors)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(address_of, tensors))


def _is_written_by_devices(tensor: Tensor) -> bool:
    """Whether a device may write this memory, which the kernel does not see."""
    initialised: Callable[[], bool] = torch.cuda.is_initialized  # torch leaves it untyped
    return initialised() and tensor.is_pinned()


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is memory of its own: no fake, no subclass, not inside a functorch transform."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not is_functorch_wrapped(tensor)
