"""Watches of memory, and whether they see a write."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from normfx.weights.watch import Watch


def accepted(tensors: list[Tensor]) -> Watch:
    watch = Watch(tensors)
    watch.accept(tensors, watch.read(tensors))
    if watch.changed(tensors):  # pages that nothing had touched are there only once they were read
        watch.accept(tensors, watch.read(tensors))
    assert not watch.changed(tensors)
    return watch


def sees(watch: Watch, tensors: list[Tensor], write: Callable[[], object]) -> bool:
    """Whether a write is seen, once: the new state can be accepted."""
    write()
    seen = watch.changed(tensors)
    watch.accept(tensors, watch.read(tensors))
    assert not watch.changed(tensors)
    return seen
