"""Kept folds: values of expressions on parameters, computed when a source changed and only then.

Dynamo does not guard which parameters a compiled graph is called with: one callable may serve many modules. So validity
is checked against the arguments of each call. A kept value belongs to an expression and the identities of its sources
(storage, address, layout), and is true as long as their stamps (watch.py) are those at which it was computed. Whatever
differs is computed again before the graph runs, in place, so that the graph's static inputs stay where they are.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from normfx.allocator import release_memory
from normfx.compat.tensors import storage_key
from normfx.compat.tracing import disable_current_modes
from normfx.weights.expression import Expression
from normfx.weights.freed import check_memory
from normfx.weights.handles import set_value, size_in_bytes
from normfx.weights.samples import is_recording, wait_for
from normfx.weights.watch import Identity, Stamp, Watch, identity, is_ordinary, storage_of

# torch leaves this one untyped
_register_hook: Callable[[Callable[..., None]], Any] = register_optimizer_step_post_hook

PARAMETER_SETS = 256
"""Parameter sets that one compiled graph keeps values of: as many as the layers of the largest models. The set that was
used longest ago makes room."""


TRIM = 2**24
"""Bytes of values computed at once, from which on the memory that computing them took is given back to the system."""


@dataclass(eq=False)
class Entry:
    """One kept value, or the handle of one (handles.py).

    identities, sources: what it was computed from, with references that keep the identities from being used again
    value:               None until it is computed, and once its memory was handed on to a successor
    seen:                the stamps of its sources at which the value was computed; None: it is to be computed
    """

    expression: Expression
    identities: tuple[Identity, ...]
    sources: tuple[Any, ...]
    value: Tensor | None
    seen: tuple[Stamp, ...] | None = None

    @property
    def expired(self) -> bool:
        """Whether a source is gone, so that no caller can ask for this value again."""
        return any(source.expired() for source in self.sources)


class Store:
    """All kept values of the process, shared by all compiled graphs that fold the same parameters the same way.

    generation: grows when values become untrue that a watch may still believe in
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self._entries: weakref.WeakValueDictionary[Any, Entry] = weakref.WeakValueDictionary()

    def entry(self, key: Any, make: Callable[[], Entry]) -> Entry:
        """The entry of (expression, identities, rebinds), made when there is none."""
        found = self._entries.get(key)
        if found is None:
            found = self._entries[key] = make()
        return found

    def forget(self, storages: Iterable[int] | None = None) -> None:
        """Recompute, at the next call, the values that depend on these storages (all values when None)."""
        with self.lock:
            written = None if storages is None else frozenset(storages)
            for entry in self.entries():
                if written is None or not written.isdisjoint(source.storage for source in entry.identities):
                    entry.seen = None
            self.generation += 1

    def entries(self) -> list[Entry]:
        """The entries that are in use."""
        with self.lock:  # another thread may be adding one
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, key: Any) -> bool:
        """Whether there is a value of (expression, identities, rebinds), or its memory."""
        found = self._entries.get(key)
        return found is not None and found.value is not None

    @property
    def bytes(self) -> int:
        """Bytes of all kept values."""
        return sum(size_in_bytes(value) for value in self._values())

    def bytes_on(self, kind: str) -> int:
        """Bytes of the values on devices of a type. Handles are on the CPU, as what they stand for."""
        return sum(size_in_bytes(value) for value in self._values() if value.device.type == kind)

    def _values(self) -> list[Tensor]:
        return [entry.value for entry in self.entries() if entry.value is not None]


STORE = Store()

if hasattr(os, "register_at_fork"):
    # a refresh is finished first: a child would inherit half of it, and a lock that is never released
    os.register_at_fork(
        before=STORE.lock.acquire, after_in_parent=STORE.lock.release, after_in_child=STORE.lock.release
    )


def refold() -> None:
    """Compute all kept folded weights newly at the next call.

    Needed only after a write that docs/folds.md lists as invisible.
    """
    STORE.forget()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimisers write parameters on a device without bumping their versions. On the CPU the memory tells."""
    if torch.compiler.is_compiling() or not len(STORE):
        return
    parameters = (p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor))
    written = {storage_key(storage_of(p)) for p in parameters if p.device.type != "cpu" and p.layout == torch.strided}
    if written:
        STORE.forget(written)


_register_hook(_after_step)


@dataclass(frozen=True)
class Fold:
    """One value that a graph takes as an input: an expression on some of the watched sources.

    sources: positions among the sources of all folds of the graph
    bytes:   of the value, or of what its handle stands for
    """

    expression: Expression
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes: int = 0

    def compute(self, sources: Sequence[Tensor]) -> Tensor:
        return self.expression(*(sources[i] for i in self.sources))

    def memory(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Binding:
    """The kept values of one graph for one set of parameters."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.entries: list[Entry] = []
        self.values: tuple[Tensor, ...] = ()
        self.generation = -1

    def current(self, sources: Sequence[Tensor]) -> bool:
        """Whether the values are true to these tensors."""
        return self.generation == STORE.generation and not self.watch.changed(sources)


class Folds:
    """The folds of one compiled graph: `values(arguments)` are their values, true to the arguments of this call.

    picks:     positions of the sources among the arguments
    rebinds:   a changed value gets new memory instead of being overwritten: needed where a backward pass may still
               hold the old one
    fits:      whether so many bytes more may be kept. Asked for each further parameter set (the graph was compiled for
               the first one); the values of one that does not fit are computed in each call and dropped
    refreshes: values computed so far, the first time included
    unkept:    calls whose values did not fit
    """

    def __init__(
        self,
        folds: Sequence[Fold],
        picks: Sequence[int],
        rebinds: bool = False,
        fits: Callable[[int], bool] = lambda more: True,
    ) -> None:
        self.folds = tuple(folds)
        self.refreshes = self.unkept = 0
        self._fits = fits
        self._rebinds = rebinds
        self._pick = picker(picks)
        self._devices = {fold.device for fold in folds if fold.device.type != "cpu"}
        self._latest: _Binding | None = None
        self._bindings: dict[tuple[Identity, ...], _Binding] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the values of the latest parameter set."""
        latest = self._latest
        return sum(map(size_in_bytes, latest.values)) if latest else 0

    @property
    def parameter_sets(self) -> int:
        return len(self._bindings)

    def _sets(self) -> list[_Binding]:
        """The parameter sets, as they are now: a model may die at any time, in any thread, and takes its own out."""
        return list(self._bindings.values())

    def values(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """The folded values for these arguments of the graph."""
        sources = self._pick(arguments)
        if self._devices and is_recording():
            return tuple(fold.compute(sources) for fold in self.folds)
        latest = self._latest
        if latest is not None and latest.current(sources):
            return latest.values
        if not all(map(is_ordinary, sources)):
            return tuple(fold.compute(sources) for fold in self.folds)
        with STORE.lock, disable_current_modes():  # a mode of the caller's must not see these operations
            binding = self._find(sources)
            if binding is not None:
                return self._refreshed(binding, sources)
            self.unkept += 1
            check_memory(sources)
            return tuple(map(self._passing, self.folds, repeat(sources)))

    def _passing(self, fold: Fold, sources: Sequence[Tensor]) -> Tensor:
        """A value, or a handle of one, that nothing keeps after the call."""
        fresh = fold.compute(sources)
        if not fresh.is_mkldnn:
            # the graph was compiled for this layout
            return fresh if fresh.stride() == fold.stride else fold.memory().copy_(fresh)
        handle = fold.memory()
        set_value(handle, fresh)
        return handle

    def _refreshed(self, binding: _Binding, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = not binding.values
        if not binding.current(sources):
            check_memory(sources)
            stamps = binding.watch.read(sources)
            binding.watch.forget()  # an exception below leaves some values new and some old
            wanted = [tuple(stamps[i] for i in fold.sources) for fold in self.folds]
            stale = [
                k
                for k, entry in enumerate(binding.entries)
                if not binding.watch.trackable or entry.seen != wanted[k] or entry.value is None
            ]
            wait_for(self._devices)  # other streams may still read what is overwritten
            for k in stale:
                self._compute(self.folds[k], binding.entries[k], sources)
            wait_for(self._devices)  # and the next caller that finds the values up to date may be on another stream
            for k in stale:
                binding.entries[k].seen = wanted[k]
            binding.values = tuple(entry.value for entry in binding.entries if entry.value is not None)
            binding.watch.accept(sources, stamps)
            binding.generation = STORE.generation
            if first and sum(self.folds[k].bytes for k in stale) >= TRIM:
                release_memory()  # what the values were computed from: the same size again, and twice where packed
        self._latest = binding
        return binding.values

    def _compute(self, fold: Fold, entry: Entry, sources: Sequence[Tensor]) -> None:
        if entry.seen is not None:
            STORE.generation += (
                1  # other graphs share the value, and may know its sources by samples that can come back
            )
        entry.seen = None
        fresh = fold.compute(sources)
        if self._rebinds or entry.value is None:
            entry.value = fold.memory()
        with torch.inference_mode(False), torch.no_grad():
            if fresh.is_mkldnn:
                set_value(entry.value, fresh)
            else:
                entry.value.copy_(fresh)
        self.refreshes += 1

    def _find(self, sources: tuple[Tensor, ...]) -> _Binding | None:
        """The binding of these tensors, made when they come for the first time; None where their values do not fit."""
        identities = tuple(map(identity, sources))
        binding = self._bindings.pop(identities, None)
        if binding is None:
            if self._bindings and not self._fits(self._missing(identities)):
                return None
            binding = self._bind(sources)
        self._bindings[identities] = binding  # the last one is the one used last
        return binding

    def _missing(self, identities: Sequence[Identity]) -> int:
        """Bytes of the values of these sources that are not there yet, less those of sets that can never come again."""
        keys = [(fold.expression, tuple(identities[i] for i in fold.sources), self._rebinds) for fold in self.folds]
        gone = sum(b.watch.expired for b in self._sets())
        whole = sum(fold.bytes for fold in self.folds)
        new = sum(fold.bytes for fold, key in zip(self.folds, keys, strict=True) if not STORE.known(key))
        return max(0, new - gone * whole)

    def _bind(self, sources: tuple[Tensor, ...]) -> _Binding:
        binding = _Binding(Watch(sources))
        binding.watch.on_deleted = partial(_drop, weakref.ref(self), weakref.ref(binding))
        old = [b for b in self._sets() if b.watch.expired or b.watch.moved(binding.watch)]
        others = [b for b in self._sets() if b not in old]
        old += others[: max(len(others) - PARAMETER_SETS + 1, 0)]
        for gone in old:
            self.retire(gone)
        binding.entries = [self._entry(k, binding, old) for k in range(len(self.folds))]
        return binding

    def _entry(self, k: int, binding: _Binding, old: Sequence[_Binding]) -> Entry:
        """The entry of fold k: shared, or new, and then in the memory of one that is no longer asked for."""
        fold = self.folds[k]
        identities = tuple(binding.watch.identities[i] for i in fold.sources)

        def make() -> Entry:
            references = tuple(binding.watch.references[source.storage] for source in identities)
            entry = Entry(fold.expression, identities, references, None)
            donors = (b.entries[k] for b in old if b.entries[k].expired and b.entries[k].value is not None)
            donor = next(donors, None)
            if donor is not None and not self._rebinds:
                entry.value, donor.value = donor.value, None
            return entry

        return STORE.entry((fold.expression, identities, self._rebinds), make)

    def let_go(self) -> None:
        """Drop all values: they are computed again when they are asked for. What other graphs share stays with them."""
        with STORE.lock:
            for binding in self._sets():
                self.retire(binding)

    def retire(self, binding: _Binding) -> None:
        """Let go of a parameter set that no caller can pass again."""
        if self._latest is binding:
            self._latest = None
        self._bindings.pop(binding.watch.identities, None)


def _drop(folds: weakref.ref[Folds], binding: weakref.ref[_Binding]) -> None:
    """The model is gone, and its folds go too."""
    owner, gone = folds(), binding()
    if owner is not None and gone is not None:
        owner.retire(gone)


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the elements at these positions of a sequence."""
    if len(positions) < 2:
        return lambda sequence: tuple(sequence[i] for i in positions)
    return itemgetter(*positions)
