"""Processes decide alike or none of them rewrites, here as threads with a store of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equivalence import EagerBackend
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

import normfx
from normfx import agreement
from normfx.checks.layouts import check_layouts, layouts
from normfx.errors import NormfxError
from normfx.graph.calls import add_call


def outcomes(store: Any, *decided: str) -> list[Any]:
    """What each process is told, or the error that it raises."""
    found: list[Any] = [None] * len(decided)

    def ask(place: int) -> None:
        try:
            found[place] = agreement._agree(store, decided[place], len(decided))
        except NormfxError as error:
            found[place] = error

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(decided))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_same_decisions() -> None:
    store = dist.HashStore()
    assert outcomes(store, "a", "a", "a") == [True] * 3
    assert agreement._agree(store, "a", 3)  # one that compiles the graph once more does not wait for the others


def test_different_decisions() -> None:
    store = dist.HashStore()
    assert outcomes(store, "a", "b", "a") == [False] * 3
    assert outcomes(store, "a", "a", "a") == [False] * 3  # others may run it untouched


def test_all_change_their_mind() -> None:
    store = dist.HashStore()
    assert outcomes(store, "a", "a") == [True] * 2
    assert outcomes(store, "b", "b") == [True] * 2


def test_one_changes_its_mind() -> None:
    """The others run the rewritten graph: it cannot compute with them."""
    store = dist.HashStore()
    assert outcomes(store, "a", "a") == [True] * 2
    alone, others = outcomes(store, "b", "c")
    assert isinstance(alone, NormfxError) and isinstance(others, NormfxError)


def test_one_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "WAIT", timedelta(seconds=0.2))
    store = dist.HashStore()
    assert not agreement._agree(store, "a", 2)
    assert not agreement._agree(store, "a", 2)  # nor for one that comes late


class Alone(nn.Module):
    """A branch whose sum is all-reduced, and rows that are gathered before they are read."""

    def __init__(self, gathers: bool) -> None:
        super().__init__()
        self.gathers = gathers
        self.table, self.norm, self.last = nn.Embedding(9, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + collectives.all_reduce(self.branch(torch.tanh(self.norm(x))), "sum", dist.group.WORLD)
        y = self.last(x)
        return self.head(
            collectives.wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(y, 1, "0")) if self.gathers else y
        )


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:normfx. what several processes:normfx.errors.NormfxWarning")
def test_others_that_do_not_agree(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no other process is rewritten all the same."""
    monkeypatch.setattr(agreement, "WAIT", timedelta(seconds=0.1))
    monkeypatch.setattr(agreement, "_groups", lambda gm: iter([frozenset({0, 1})]))
    for module in ("normfx.backend", "normfx.lower.folded"):
        monkeypatch.setattr(f"{module}.compile_graph", lambda gm, example_inputs, patches: gm)
    model, ids = Alone(gathers=False).double(), torch.arange(8).reshape(2, 4)
    options = {"fold": "live", "strict": True}
    got = torch.compile(model, backend="normfx", options=options, fullgraph=True)(ids)
    torch.testing.assert_close(got, model(ids), rtol=1e-10, atol=1e-10)
    first, last = normfx.compiled_report().sites
    assert "pre_rms_norm" in first.rules  # of looked-up rows alone
    assert "pre_rms_norm" not in last.rules and "fold_affine" in last.rules


@pytest.mark.parametrize("gathers", [False, True])
def test_collectives_keep_centred(group: None, gathers: bool) -> None:
    """γ does not pass a gathering: a process would get the gradient of other rows and features than it does in eager
    mode, though their sum over processes is the same."""
    model, ids = Alone(gathers).double(), torch.arange(8).reshape(2, 4)
    grads = []
    backend = EagerBackend()
    for call in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        call(ids).pow(3).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)
    first, last = backend.report.sites
    assert "pre_rms_norm" in first.rules and "pre_rms_norm" in last.rules
    assert ("fold_affine" in last.rules) is not gathers


def test_reductions_that_are_not_linear(group: None) -> None:
    weight = nn.Parameter(torch.randn(8, 8))

    def call(x: Tensor) -> Tensor:
        return nn.functional.layer_norm(collectives.all_reduce(x @ weight, "max", dist.group.WORLD), (8,))

    backend = EagerBackend()
    with torch.no_grad():
        torch.compile(call, backend=backend, fullgraph=True)(torch.randn(4, 8))
    assert next(r.code for r in backend.report.sites[0].refusals) == "uncentred_input"


def test_layouts_stay(group: None) -> None:
    """An edit that lays a weight out in another way is noticed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(DTensor.from_local(torch.randn(4, 4), mesh, [Shard(0)], run_check=False))

    def call(weight: Any) -> Any:
        return torch.add(weight, weight).redistribute(placements=[Shard(1)]).to_local()

    backend = EagerBackend({"rules": "none"})
    torch.compile(call, backend=backend, fullgraph=True)(weight)
    from normfx.backend import forced

    torch._dynamo.reset()
    with forced():
        torch.compile(call, backend=backend, fullgraph=True)(weight)
    graph = backend.modules[-1].graph
    before = layouts(graph)
    check_layouts(graph, before)
    (source,) = graph.find_nodes(op="placeholder")[:1]
    (total,) = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    with graph.inserting_before(total):
        other = add_call(graph, torch.ops.aten.t.default, (source,), total)
    total.args = (other, other)
    with pytest.raises(NormfxError, match="laid out"):
        check_layouts(graph, before)
