"""The steps of a random sequence: every way to write a model, and calls that are compared with eager mode.

store_fuzz.py puts them in a row.
"""

from __future__ import annotations

import contextvars
import gc
import os
import random
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from folding import Net
from torch import Tensor, nn

import normfx
from normfx.weights import store

TOLERANCE = 1e-8
"""Relative; of values in float64. A stale fold is off by 1e-4 and more."""

WIDTHS = (8, 80)
"""Weights of the first width share their pages with other memory, those of the second have pages of their own."""


class State:
    """The models and callables of one sequence, and its random choices."""

    def __init__(self, seed: int, frozen: bool) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.width = self.random.choice(WIDTHS)
        self.models = [self.model() for _ in range(self.random.choice([1, 1, 2, 3]))]
        self.callables = CALLABLES["frozen" if frozen else "cached"]
        self.saved: list[Tensor] = []
        self.folder = tempfile.TemporaryDirectory()
        self.trace: list[str] = []

    def model(self) -> Net:
        model = Net(self.width).double().eval()
        for p in model.parameters():
            p.requires_grad_(False)
        return model

    def pick(self) -> Net:
        return self.random.choice(self.models)

    def parameter(self) -> nn.Parameter:
        return self.random.choice(list(self.pick().parameters()))

    def part(self, tensor: Tensor) -> Tensor:
        """Some of a tensor's entries: all, rows, one row, one entry, every tenth."""
        tensor = tensor.detach()
        start = self.random.randrange(tensor.numel())
        if not tensor.is_contiguous():
            row = start % len(tensor)
            return self.random.choice([tensor, tensor[row:], tensor[:, row : row + 1], tensor[row, row : row + 1]])
        flat = tensor.view(-1)
        return self.random.choice(
            [flat, flat[start:], flat[: start + 1], flat[start : start + 1], flat[start::10], tensor[-1:]]
        )


Step = Callable[[State], object]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


@step
def through_data(s: State) -> None:
    p = s.parameter()
    s.part(p.data).add_(s.random.choice([0.5, -1.0, 1e-3]))


@step
def in_place(s: State) -> None:
    with torch.no_grad():
        s.part(s.parameter()).mul_(-1.5)


@step
def through_numpy(s: State) -> None:
    view = s.part(s.parameter()).numpy()
    view += s.random.random() + 0.1


@step
def through_dlpack(s: State) -> None:
    torch.from_dlpack(s.part(s.parameter())).neg_()


@step
def other_memory(s: State) -> None:
    p = s.parameter()
    p.data = torch.randn_like(p)


@step
def other_parameter(s: State) -> None:
    model = s.pick()
    model.up.weight = nn.Parameter(torch.randn_like(model.up.weight), requires_grad=False)


@step
def load(s: State) -> None:
    s.pick().load_state_dict(s.model().state_dict(), assign=s.random.random() < 0.5)


@step
def save(s: State) -> None:
    s.saved = [p.detach().clone() for p in s.models[0].parameters()]


@step
def bring_back(s: State) -> None:
    """What was saved comes back, bit by bit the same."""
    for p, kept in zip(s.models[0].parameters(), s.saved, strict=False):
        p.data.copy_(kept)


@step
def exchange(s: State) -> None:
    """The averaged weights come in, and the others go out."""
    one, other = s.pick(), s.pick()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        if s.random.random() < 0.5:
            p.data, q.data = q.data, p.data
        else:
            kept = p.detach().clone()
            p.data.copy_(q.data)
            q.data.copy_(kept)


@step
def alias_with_another_layout(s: State) -> None:
    model = s.pick()
    layout = s.random.choice([lambda w: w.t(), lambda w: w, lambda w: w.flip(0), lambda w: w.t().contiguous().t()])
    model.down.weight = nn.Parameter(layout(model.up.weight.detach()), requires_grad=False)


@step
def flat_vector(s: State) -> None:
    """All parameters become slices of one vector, which is then written."""
    model = s.pick()
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    nn.utils.vector_to_parameters(vector, model.parameters())
    call(s)
    s.part(vector).add_(0.25)


@step
def over_numpy(s: State) -> None:
    """The memory belongs to NumPy, and two storages share it."""
    model = s.pick()
    array = np.random.default_rng(s.random.randrange(1000)).standard_normal(model.up.weight.shape)
    model.up.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    model.down.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    call(s)
    array[s.random.randrange(array.shape[0]), 0] += 1.0


@step
def mapped_file(s: State) -> None:
    """All parameters become a private mapping of a file, as `torch.load(mmap=True)` makes them."""
    model, path = s.pick(), Path(s.folder.name) / str(len(s.trace))
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    vector.numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=False, size=vector.numel(), dtype=vector.dtype)
    nn.utils.vector_to_parameters(mapped, model.parameters())
    call(s)
    file_written(s)


@step
def file_written(s: State) -> None:
    """Some entries of a file change, in the file."""
    paths = sorted(Path(s.folder.name).iterdir())
    if paths:
        path = s.random.choice(paths)
        count = path.stat().st_size // 8
        start = s.random.randrange(count)
        entries = np.random.default_rng(start).standard_normal(s.random.choice([1, count - start]))
        with path.open("r+b") as opened:
            opened.seek(8 * start)
            opened.write(entries.tobytes())
        if s.random.random() < 0.2:
            path.unlink()


@step
def storage_copy(s: State) -> None:
    p = s.parameter()
    p.untyped_storage().copy_(torch.randn(p.untyped_storage().nbytes() // 8, dtype=p.dtype).untyped_storage())


@step
def freed_and_filled(s: State) -> None:
    p = s.parameter()
    storage, kept = p.untyped_storage(), p.detach().clone()
    if not storage.resizable() or storage.nbytes() != p.nbytes:  # NumPy has it too, or other parameters have
        return
    size = storage.nbytes()
    storage.resize_(0)
    hold = torch.empty(size, dtype=torch.uint8) if s.random.random() < 0.5 else None
    storage.resize_(size)
    p.data.copy_(kept * s.random.choice([1.0, 2.0]))
    del hold


@step
def fused_step(s: State) -> None:
    p = s.parameter()
    gradient = torch.zeros_like(p)
    s.part(gradient).fill_(1.0)
    torch._fused_sgd_(
        [p.detach()], [gradient], [], weight_decay=0.0, momentum=0.0, lr=0.5, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    )  # fmt: skip


@step
def collective(s: State) -> None:
    """A collective of a group of one process; all but the first bump no version."""
    p = s.parameter()
    fresh, written = torch.randn_like(p).contiguous(), p.detach()
    if written.is_contiguous():
        collectives = [
            lambda: dist.all_gather([written], fresh),
            lambda: dist.scatter(written, [fresh]),
            lambda: dist.all_to_all_single(written, fresh),
        ]
        s.random.choice(collectives)()


@step
def in_a_thread(s: State) -> None:
    """Another thread writes, and calls."""

    def work() -> None:
        through_data(s)
        call(s)

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            with torch.no_grad():
                work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(guarded,))  # Dynamo's settings come along
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@step
def failure_in_the_middle(s: State) -> None:
    """A refresh that stops after some of its values."""
    left = s.random.randrange(4)

    def compute(self: store.Fold, sources: list[Tensor]) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return self.expression(*(sources[i] for i in self.sources))

    kept = [p.detach().clone() for p in s.models[0].parameters()]
    through_data(s)
    in_compilation = torch._dynamo.exc.BackendCompilerFailed
    in_freezing = normfx.StageError  # a frozen variant computes its folds when it is built
    with mock.patch.object(store.Fold, "compute", compute), suppress(MemoryError, in_compilation, in_freezing):
        call(s, s.models[0])
    if s.random.random() < 0.5:
        for p, saved in zip(s.models[0].parameters(), kept, strict=True):
            p.data.copy_(saved)


@step
def delete(s: State) -> None:
    s.models[s.random.randrange(len(s.models))] = s.model()
    if s.random.random() < 0.2:
        gc.collect()


@step
def refold(s: State) -> None:
    normfx.refold()


@step
def in_a_child(s: State) -> None:
    """A child writes to its own memory; now and then, since a fork takes long."""
    if s.random.random() < 0.9 or threading.active_count() > 1:
        return
    child = os.fork()
    if child == 0:
        good = False
        try:
            call(s)
            through_data(s)
            call(s)
            good = True
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0, "a child got a stale fold"


def call(s: State, model: Net | None = None) -> None:
    """One of the callables on one of the models, compared with eager mode."""
    model = model or s.pick()
    run, x = s.random.choice(s.callables), INPUTS[s.random.randrange(len(INPUTS))]
    expected, actual = model(x), run(model, x)
    error = (actual - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE:
        raise AssertionError(f"relative error {error:.3g}")


CALLABLES: dict[str, list[Callable[[Net, Tensor], Tensor]]] = {}
"""The compiled functions of each kind of fold. All sequences share them (store_fuzz.py)."""

INPUTS = [torch.linspace(-1, 1, 6 * n, dtype=torch.float64).reshape(n, 6).sin() for n in (2, 5)]
