"""Kept folds: values of expressions on parameters, computed when a source changed and only then.

Dynamo does not guard which parameters a compiled graph is called with: one callable may serve many modules. So
validity is checked against the arguments of each call. A source is the same if it is the same storage (held by a
weak reference, so that its identity cannot be used again), at the same address, with the same version and the same
samples (probe.py), and no optimiser has stepped over it. Whatever differs is recomputed before the graph runs, in
place, so that the graph's static inputs stay where they are.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef  # private in name only; torch 2.11 to 2.15
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from normfx.weights.expression import Expression
from normfx.weights.handles import put_behind, size_in_bytes
from normfx.weights.probe import Probe, address_of, pointer_of, probe, storage_of, version_of

# torch leaves these two untyped
_weak_reference: Callable[[torch.UntypedStorage], Any] = StorageWeakRef
_register_hook: Callable[[Callable[..., None]], Any] = register_optimizer_step_post_hook

Identity = tuple[int, int]
"""Storage and address of a source. Never used again while a StorageWeakRef on the storage is held."""


@dataclass(eq=False)
class Entry:
    """One kept value, or the handle of one (handles.py).

    identities, sources: what it was computed from, with references that keep the identities from being used again
    value:               None once its memory was handed on to a successor
    seen:                version and samples of each source when it was computed; None: recompute
    """

    expression: Expression
    identities: tuple[Identity, ...]
    sources: tuple[Any, ...]
    value: Tensor | None
    seen: tuple[Any, ...] | None = None

    @property
    def expired(self) -> bool:
        """Whether a source is gone, so that nobody can ask for this value again."""
        return any(source.expired() for source in self.sources)


class Store:
    """All kept values of the process, shared by all compiled graphs that fold the same parameters the same way."""

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
                if written is None or not written.isdisjoint(storage for storage, _ in entry.identities):
                    entry.seen = None
            self.generation += 1

    def entries(self) -> list[Entry]:
        """The entries that are in use."""
        return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of all kept values."""
        return sum(size_in_bytes(entry.value) for entry in self.entries() if entry.value is not None)


STORE = Store()


def refold() -> None:
    """Compute all kept folded weights anew at the next call.

    Needed only after single entries of a parameter were written behind autograd's back, through `.data`, NumPy or
    DLPack, where the sampled fingerprint may not see it. See docs/folds.md.
    """
    STORE.forget()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimisers write parameters without bumping their versions."""
    if torch.compiler.is_compiling() or not len(STORE):
        return  # a compiled step bumps the versions
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    STORE.forget(storage_of(p)._cdata for p in parameters if isinstance(p, Tensor) and p.layout == torch.strided)


_register_hook(_after_step)


@dataclass(frozen=True)
class Seen:
    """What a Watch read: the store's generation, version and samples of each source."""

    generation: int
    versions: list[int]
    samples: list[tuple[int, ...]]

    def of(self, positions: Iterable[int]) -> tuple[Any, ...]:
        return tuple((self.versions[i], self.samples[i]) for i in positions)


class Watch:
    """Tells whether a list of tensors is what it was: identities, versions and samples.

    untrackable: one of them was made under inference_mode and has no version; nothing is believed of the list
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.references = tuple(_weak_reference(storage_of(t)) for t in tensors)
        self.storages = [reference.cdata for reference in self.references]
        self.pointers = [*map(pointer_of, tensors)]
        self.untrackable = any(t.is_inference() for t in tensors)
        self._probe: Probe = probe(tensors)
        self._generation = -1

    @property
    def identities(self) -> list[Identity]:
        return list(zip(self.storages, self.pointers, strict=True))

    @property
    def expired(self) -> bool:
        return any(reference.expired() for reference in self.references)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that are watched."""
        return [*map(pointer_of, tensors)] == self.pointers and [
            *map(address_of, map(storage_of, tensors))
        ] == self.storages

    def current(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the watched tensors, as they were accepted."""
        return self._generation == STORE.generation and not self._probe.changed(tensors)

    def read(self, tensors: Sequence[Tensor]) -> Seen:
        """What they are now. Read before anything is computed from them, so that a later write shows."""
        versions = [0] * len(tensors) if self.untrackable else [*map(version_of, tensors)]
        return Seen(STORE.generation, versions, self._probe.read(tensors))

    def accept(self, tensors: Sequence[Tensor], seen: Seen) -> None:
        """Compare with this from now on. Only after all that depends on it is up to date: other threads look."""
        if not self.untrackable:
            self._probe.accept(tensors, seen.versions, seen.samples)
            self._generation = seen.generation


@dataclass(frozen=True)
class Fold:
    """One value that a graph takes as an input: an expression on some of the watched sources.

    sources: positions among the sources of all folds of the graph
    """

    expression: Expression
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def memory(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class _Binding:
    """The kept values of one graph for one set of parameters."""

    def __init__(self, watch: Watch, entries: list[Entry]) -> None:
        self.watch = watch
        self.entries = entries
        self.values: tuple[Tensor, ...] = ()


class Folds:
    """The folds of one compiled graph: `values(arguments)` are their values, true to the arguments of this call.

    picks:     positions of the sources among the arguments
    rebinds:   a changed value gets new memory in place of being overwritten: needed where a backward pass may still
               hold the old one
    refreshes: values computed so far, the first time included
    """

    def __init__(self, folds: Sequence[Fold], picks: Sequence[int], rebinds: bool = False) -> None:
        self.folds = tuple(folds)
        self.refreshes = 0
        self._rebinds = rebinds
        self._pick = picker(picks)
        self._latest: _Binding | None = None
        self._by_storage: dict[int, list[_Binding]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the values of the latest parameter set."""
        return sum(map(size_in_bytes, self._latest.values)) if self._latest else 0

    @property
    def parameter_sets(self) -> int:
        return sum(map(len, self._by_storage.values()))

    def values(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """The folded values for these arguments of the graph."""
        sources = self._pick(arguments)
        latest = self._latest
        if latest is not None and latest.watch.current(sources):
            return latest.values
        with STORE.lock:
            return self._refreshed(sources)

    def _refreshed(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        binding = self._find(sources)
        watch = binding.watch
        if not watch.current(sources):
            seen = watch.read(sources)
            for fold, entry in zip(self.folds, binding.entries, strict=True):
                wanted = seen.of(fold.sources)
                if watch.untrackable or entry.seen != wanted:
                    self._compute(fold, entry, sources)
                    entry.seen = wanted
            binding.values = tuple(entry.value for entry in binding.entries if entry.value is not None)
            watch.accept(sources, seen)
        if binding is not self._latest:
            self._latest = binding
            self._drop_expired()
        return binding.values

    def _compute(self, fold: Fold, entry: Entry, sources: Sequence[Tensor]) -> None:
        fresh = fold.expression(*(sources[i] for i in fold.sources))
        if self._rebinds or entry.value is None:
            entry.value = fold.memory()
        with torch.inference_mode(False), torch.no_grad():
            if fresh.is_mkldnn:
                put_behind(entry.value, fresh)
            else:
                entry.value.copy_(fresh)
        self.refreshes += 1

    def _find(self, sources: tuple[Tensor, ...]) -> _Binding:
        """The binding of these tensors, made when they come for the first time."""
        first = storage_of(sources[0])._cdata
        for binding in self._by_storage.get(first, ()):
            if binding.watch.same(sources):
                return binding
        watch = Watch(sources)
        dead = [binding for group in self._by_storage.values() for binding in group if binding.watch.expired]
        entries = [self._entry(k, watch, dead) for k in range(len(self.folds))]
        binding = _Binding(watch, entries)
        self._by_storage.setdefault(first, []).append(binding)
        return binding

    def _entry(self, k: int, watch: Watch, dead: Sequence[_Binding]) -> Entry:
        """The entry of fold k: shared, or new, and then in the memory of one whose sources are gone."""
        fold = self.folds[k]
        identities = tuple((watch.storages[i], watch.pointers[i]) for i in fold.sources)

        def make() -> Entry:
            old = next((b.entries[k] for b in dead if b.entries[k].expired and b.entries[k].value is not None), None)
            entry = Entry(fold.expression, identities, tuple(watch.references[i] for i in fold.sources), None)
            if old is not None and not self._rebinds:
                entry.value, old.value = old.value, None
            return entry

        return STORE.entry((fold.expression, identities, self._rebinds), make)

    def _drop_expired(self) -> None:
        """Let go of parameter sets that nobody can come with again."""
        left = {first: [b for b in group if not b.watch.expired] for first, group in self._by_storage.items()}
        self._by_storage = {first: group for first, group in left.items() if group}


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the elements at these positions of a sequence."""
    if len(positions) < 2:
        return lambda sequence: tuple(sequence[i] for i in positions)
    return itemgetter(*positions)
