"""What other threads do meanwhile: models that die, reports that are read; and what may not grow."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from folding import X, net
from torch import Tensor, nn
from torch.fx import Graph

from normfx.weights import store
from normfx.weights.expression import Expression


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Call a function again and again in another thread, which gets its turn often; its errors."""
    errors: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                act()
            except BaseException as error:
                errors.append(error)

    thread, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        yield errors
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def one_callable() -> Callable[[nn.Module, Tensor], Tensor]:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return out

    return torch.compile(call, backend="normfx", options={"fold": "cached", "strict": True})


def test_models_die_in_another_thread() -> None:
    """Each takes its values out of the table that the next call walks over."""
    call, pool = one_callable(), list[nn.Module]()

    def drop() -> None:
        if len(pool) > 20:
            pool.pop(0)
        else:
            time.sleep(0)

    with torch.no_grad(), meanwhile(drop) as errors:
        for _ in range(150):
            pool.append(net())
            torch.testing.assert_close(call(pool[-1], X), pool[-1](X), rtol=0, atol=1e-12)
    assert not errors


def test_entries_are_listed_while_others_are_made() -> None:
    """As a report does, which another thread reads."""
    shared, living = store.Store(), list[store.Entry]()

    def add() -> None:
        if len(living) < 50_000:
            entry = store.Entry(Expression("", Graph()), (), (), None)
            with shared.lock:
                living.append(shared.entry(len(living), lambda: entry))

    with meanwhile(add) as errors:
        for _ in range(300):
            listed = shared.entries()
            assert len(set(map(id, listed))) == len(listed) <= len(living)
            assert shared.bytes == 0
    assert living and not errors


def test_a_living_storage_is_not_held_by_watches_that_are_gone() -> None:
    """Every set of values looks after its storages; when the set goes, so does that."""
    model, call = net(), one_callable()
    storages = [p.untyped_storage() for p in model.parameters()]
    counts = []
    with torch.no_grad():
        for _ in range(30):
            for p, storage in zip(model.parameters(), storages, strict=True):
                kept, size = p.detach().clone(), storage.nbytes()
                storage.resize_(0)
                torch.empty(size, dtype=torch.uint8)
                storage.resize_(size)
                p.data.copy_(kept)
            torch.testing.assert_close(call(model, X), model(X), rtol=0, atol=1e-12)
            counts.append((sum(map(weakref.getweakrefcount, storages)), len(weakref.finalize._registry)))
    assert counts[-1][0] <= counts[4][0] and counts[-1][1] <= counts[4][1]


@pytest.mark.parametrize("name", ["up.weight", "enter.weight"])
def test_freed_while_training(name: str) -> None:
    """A fold that is computed in the graph is a kernel of its own, which would read memory that is not there."""
    model = net()
    call = torch.compile(model, backend="normfx", options={"fold": "live", "strict": True})
    call(X).sum().backward()
    weight = model.get_parameter(name)
    storage, kept = weight.untyped_storage(), weight.detach().clone()
    storage.resize_(0)
    with pytest.raises(RuntimeError):
        model(X)
    with pytest.raises(RuntimeError, match="has no memory"):
        call(X)
    storage.resize_(kept.nbytes)
    weight.data.copy_(kept)
    torch.testing.assert_close(call(X), model(X), rtol=0, atol=1e-12)
