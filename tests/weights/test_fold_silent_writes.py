"""Writers that bump no version: other objects on the same memory, other processes, forks, random sequences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from folding import KEPT, X, check, compiled, folding, net
from paths import SUPPORT
from torch import library, nn

WIDE = 80
"""Weights of this width are watched by pages where the kernel helps."""


# ---------------------------------------------------------------- writers that leave no trace


def compiled_fused_step(model: nn.Module) -> None:
    """Few rows have a gradient, as in a head of many tasks."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[3:5] = 1.0
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    torch.compile(lambda: optimiser.step())()


def storage_copy(model: nn.Module) -> None:
    for p in model.parameters():
        p.untyped_storage().copy_(torch.randn_like(p).untyped_storage())


def vector_entry(model: nn.Module) -> None:
    """The flat vector has a version counter of its own."""
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    model(X)
    vector[::50] += 1.0


def second_parameter(model: nn.Module) -> None:
    other = nn.Parameter(model.up.weight.data)
    with torch.no_grad():
        other[3:5] += 1.0


def custom_op(model: nn.Module) -> None:
    """Torch believes the schema, and hands out no version."""
    if not hasattr(torch.ops.normfx_tests, "bump"):
        library.define("normfx_tests::bump", "(Tensor w) -> ()")
        library.impl("normfx_tests::bump", "CPU", lambda w: w.data.numpy().__setitem__(0, 9.0))
    torch.ops.normfx_tests.bump(model.up.weight.detach()[5])


def block(model: nn.Module) -> None:
    model.up.weight.data[5:9] = 0.5


def column(model: nn.Module) -> None:
    model.up.weight.data[:, 3] = 0.5


def twentieth(model: nn.Module) -> None:
    weight = model.up.weight.data.view(-1)
    weight[torch.randperm(weight.numel())[: weight.numel() // 20]] += 1.0


SILENT = [compiled_fused_step, storage_copy, vector_entry, second_parameter, custom_op, block, column, twentieth]


@pytest.mark.parametrize("fold", KEPT)
@pytest.mark.parametrize("write", SILENT)
def test_writers_that_tell_no_one(write: Callable[[nn.Module], None], fold: str) -> None:
    model = net(width=WIDE)
    call = compiled(model, fold)
    before = check(call, model)
    write(model)
    check(call, model, before)


def in_process(code: str, timeout: int = 300) -> None:
    """Runs a script that has this folder's modules; one thread, since OpenMP does not survive a fork."""
    head = f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\nimport torch; torch.set_num_threads(1)\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


COLLECTIVES = """
import os, torch.distributed as dist, torch.multiprocessing as mp
from folding import check, compiled, net

def run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = net(rank, width=80)
    call = compiled(model, "cached")
    before = check(call, model)
    for p in model.parameters():
        dist.all_reduce(p.detach())
    before = check(call, model, before)
    with torch.no_grad():
        model.up.weight[rank] += 1
    check(call, model)
    dist.broadcast(model.up.weight.detach()[:2], src=0)
    check(call, model)
    dist.barrier()

if __name__ == "__main__":
    import tempfile
    mp.start_processes(run, (tempfile.mktemp(),), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_collectives() -> None:
    in_process(COLLECTIVES)


FORKS = """
import os, threading, time
from folding import X, check, net
from normfx.backend import normfx

model = net(width=80)
calls = []

def backend(gm, inputs):
    compiled = normfx(gm, inputs, options={"fold": "cached", "strict": True})
    return lambda *args: (calls.append((compiled, args)), compiled(*args))[1]

call = torch.no_grad()(torch.compile(model, backend=backend))
check(call, model)
compiled, args = calls[0]
stop = threading.Event()

def refresh():  # below Dynamo: its guards have a lock of their own, with which forks hang as well
    while not stop.is_set():
        model.norm1.bias.data.add_(0.001)
        compiled(*args)

thread = threading.Thread(target=refresh)
thread.start()
children = []
for _ in range(12):
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        check(call, model)
        model.up.weight.data[3:4] = 2.0
        check(call, model)
        os._exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
stop.set()
thread.join()
check(call, model)
assert codes == [0] * 12, codes
"""


def test_forks_while_a_thread_refreshes() -> None:
    in_process(FORKS)


SHARED = """
import os
from folding import check, compiled, net

model = net(width=80).share_memory()
call = compiled(model, "cached")
before = check(call, model)
for entry in (0, 3000):
    child = os.fork()
    if child == 0:
        model.up.weight.data.view(-1)[entry] += 50.0
        os._exit(0)
    os.waitpid(child, 0)
    before = check(call, model, before)
"""


def test_another_process_writes_shared_weights() -> None:
    in_process(SHARED)


@pytest.mark.parametrize("watched", [False, True])
def test_auto_keeps_folds_only_where_the_kernel_helps(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing all contents in each call is exact too, but may cost more than folding gains."""
    monkeypatch.setattr("normfx.weights.kept.watches_pages", lambda: watched)
    model = net()
    call = compiled(model, "auto")
    before = check(call, model)
    assert folding().variants == (("cached",) if watched else ("live",))
    block(model)
    check(call, model, before)


# ---------------------------------------------------------------- random sequences


def test_random_sequences() -> None:
    """tests/support/store_fuzz.py, a few."""
    in_process("import store_fuzz\nwith store_fuzz.without_inductor():\n    [*map(store_fuzz.run_sequence, range(40))]")


@pytest.mark.slow
def test_many_random_sequences() -> None:
    code = (
        "import store_fuzz\nwith store_fuzz.without_inductor():\n    [*map(store_fuzz.run_sequence, range(100, 700))]"
    )
    in_process(code, timeout=900)
