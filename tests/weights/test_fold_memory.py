"""The memory that kept, packed and frozen weights take: bounded, taken once, never at the price of a right answer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from equivalence import EagerBackend
from folding import X, check, compiled, folding, net
from torch import Tensor, nn
from writes import WRITES

import normfx
from normfx.errors import OptionError
from normfx.lower import affordable, constants, gemm, packed, packing
from normfx.options import Options, parse_bytes
from normfx.weights import budget, store

DTYPES = [torch.float32, torch.bfloat16]
WIDTH = 32
WHOLE = 2 * WIDTH * WIDTH
"""Entries of the two square weights of `net`, which are the largest ones."""


@pytest.fixture(autouse=True)
def _small_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights are looked at and packed too, whatever this machine is fast at. Kept variants need no Inductor."""
    monkeypatch.setattr("normfx.lower.folded.compile_graph", lambda gm, inputs, patches: gm.forward)
    monkeypatch.setattr(packed, "packed_is_faster", gemm.onednn_works)
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: False)
    monkeypatch.setattr(affordable, "packed_gain", lambda dtype: 1e-12)
    for module in (gemm, constants):
        monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(packing, "LEAST", dict.fromkeys(packing.LEAST, 1))
    monkeypatch.setattr(affordable, "SMALL", 0)
    torch._dynamo.reset()
    gc.collect()
    assert store.STORE.bytes == 0
    yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_more_bytes_than_the_budget(dtype: torch.dtype) -> None:
    model = net(dtype=dtype, width=WIDTH)
    size = torch.empty((), dtype=dtype).element_size()
    found = []
    for memory in (0, (WHOLE // 2 + 750) * size, 4 * WHOLE * size):
        torch._dynamo.reset()
        gc.collect()
        call = compiled(model, "cached", fold_memory=memory)
        expected = copy.deepcopy(model).double()(X)
        torch.testing.assert_close(call(X.to(dtype)).double(), expected, rtol=0, atol=0.2 if size == 2 else 1e-4)
        assert store.STORE.bytes <= memory
        found.append(store.STORE.bytes)
        reports = [graph.weights for graph in normfx.compiled_report().graphs if graph.weights]
        assert all(weights.budget == memory for weights in reports if "cached" in weights.variants)
    assert found[0] == 0 <= found[1] <= found[2]
    if gemm.onednn_works(dtype):  # else nothing of the model is kept in bfloat16: see refusal rounded_weight
        assert WHOLE * size // 4 <= found[1] < found[2] <= 1.4 * WHOLE * size


@pytest.mark.parametrize("name", ["p.data = t", "numpy"])
def test_never_stale_within_a_budget(name: str) -> None:
    model = net(dtype=torch.float32, width=WIDTH)
    call = compiled(model, "cached", fold_memory=4 * WHOLE // 2 + 3000)
    before = check(call, model)
    with torch.enable_grad():
        WRITES[name](model)
    check(call, model, before)
    check(call, model)


class Pooled(nn.Module):
    """Two linear layers of one size: `often` multiplies all rows, `seldom` their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom, self.norm, self.often = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        seldom = self.seldom(torch.tanh(x).mean(0, keepdim=True))
        return torch.tanh(self.often(self.norm(x))) * seldom


def test_the_largest_gain_per_byte_goes_first() -> None:
    model, x = Pooled(), torch.randn(50, 32)
    backend = EagerBackend({"fold": "cached", "fold_memory": 32 * 32 * 4 + 400})
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)
    (module,) = backend.modules
    (product,) = (node for node in module.graph.nodes if node.target is packed.PACKED_LINEAR)
    assert product.args[0].meta["val"].shape[0] == 50


def test_the_reason_is_reported() -> None:
    model = net(dtype=torch.float32, width=WIDTH)
    call = compiled(model, "cached", fold_memory=1000)
    call(X.float())
    weights, text = folding(), str(folding())
    assert any("weight" in name for name in weights.left) and "did not fit" in text
    with torch.no_grad():
        report = normfx.explain(model, {"fold": "cached", "fold_memory": 0})(X.float())
    refused = [refusal for site in report.sites for refusal in site.refusals]
    assert refused and all("fold_memory" in refusal.hint for refusal in refused if refusal.code == "live_weights")


def test_parameter_sets_share_the_budget() -> None:
    options = {"fold": "cached", "strict": True, "fold_memory": 3 * 4 * WHOLE}
    run = torch.compile(lambda model, x: model(x), backend="normfx", fullgraph=True, options=options)
    models = [net(seed, torch.float32, WIDTH) for seed in range(5)]
    with torch.no_grad():
        for _ in range(2):
            for model in models:
                torch.testing.assert_close(run(model, X.float()), model(X.float()), rtol=1e-4, atol=1e-4)
                assert store.STORE.bytes <= 3 * 4 * WHOLE
        unkept, sets = folding().unkept, folding().parameter_sets
        assert sets == 2 and unkept == 2 * 3 and "did not fit" in str(folding())
        WRITES["p.data.add_"](models[4])  # whose folds are not kept
        torch.testing.assert_close(run(models[4], X.float()), models[4](X.float()), rtol=1e-4, atol=1e-4)
        del models[:2], model
        gc.collect()
        torch.testing.assert_close(run(models[2], X.float()), models[2](X.float()), rtol=1e-4, atol=1e-4)
        assert folding().unkept == unkept + 1, "there is room again"


def test_two_graphs_take_what_they_share_once() -> None:
    model = net(dtype=torch.float32, width=WIDTH)
    check(compiled(model, "cached"), model)
    size = store.STORE.bytes
    second = compiled(lambda x: model(x), "cached", fold_memory=size)
    check(second, model)
    assert store.STORE.bytes == size and not folding().left


# ---------------------------------------------------------------- frozen


def living(entries: int) -> tuple[int, int]:
    """Ordinary and packed tensors of so many entries that are alive, each memory once."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() == entries]
    dense = {t.untyped_storage().data_ptr() for t in found if t.layout == torch.strided}
    return len(dense), sum(t.is_mkldnn for t in found)


def test_frozen_weights_are_there_once() -> None:
    """Entries of 96 × 96 occur nowhere else."""
    entries, model = 96 * 96, net(dtype=torch.float32, width=96)
    assert living(entries) == (2, 0)
    call = compiled(model, "frozen")
    before = check(call, model)
    assert "frozen" in folding().variants and store.STORE.bytes == 0 == folding().bytes
    dense, packed_ones = living(entries)
    assert (dense, packed_ones) in ((2, 2), (4, 0)), "the parameters, and their folds: packed or not"
    frozen = sum(size for sizes in budget.HELD.values() for size in sizes.values())
    assert frozen == folding().frozen_bytes and 2 * 4 * entries <= frozen <= 2.5 * 4 * entries
    WRITES["p.data.add_"](model)
    check(call, model, before)
    assert folding().frozen_bytes == 0 == len(budget.HELD) and store.STORE.bytes == folding().bytes == frozen
    assert living(entries) == (4, 0)


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.read = nn.Embedding(1000, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(torch.tanh(self.norm(self.table(ids))))


def test_tables_are_not_copied() -> None:
    model, ids = Looked(), torch.arange(6)
    call = torch.compile(model, backend="normfx", options={"fold": "frozen", "strict": True})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(call(ids), model(ids), rtol=1e-4, atol=1e-4)
            assert folding().freezes == 1
            model.table.weight.data.mul_(1.5)
    assert living(16000) == (1, 0)


def test_what_does_not_fit_is_not_frozen() -> None:
    model = net(dtype=torch.float32, width=WIDTH)
    call = compiled(model, "frozen", fold_memory=2000, rules="none")
    before = check(call, model)
    assert folding().unfrozen and folding().frozen_bytes <= 2000
    WRITES["p.data.add_"](model)
    check(call, model, before)


# ---------------------------------------------------------------- budgets


def test_the_machine_bounds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    total, available = budget.machine_memory(cpu)
    assert 0 < available <= total
    monkeypatch.setattr(budget, "machine_memory", lambda device: (2**30, 2**20))
    assert budget.budget(2**40, cpu) == budget.Budget(2**19, 0)
    assert budget.budget(2**10, cpu).room == 2**10
    monkeypatch.setattr(budget, "machine_memory", lambda device: (2**30, 2**30))
    assert budget.budget(None, cpu).limit == 2**28


@pytest.mark.parametrize("version", [1, 2])
def test_cgroups(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a group that contains the process's own counts too."""
    inner = tmp_path / ("memory" if version == 1 else "") / "jobs" / "one"
    inner.mkdir(parents=True)
    limit, use, droppable = budget._FILES["memory" if version == 1 else ""]
    for folder, most, used in ((inner, "max", 300), (inner.parent, "5000", 1200)):
        (folder / Path(limit).name).write_text(most if version == 2 or most != "max" else str(2**63 - 4096))
        (folder / Path(use).name).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{droppable} 200\n")
    monkeypatch.setattr(budget, "ROOT", tmp_path)
    found = list(budget._limits("memory" if version == 1 else "", "/jobs/one"))
    assert (5000, 1000) in found and all(size in (5000, 2**63 - 4096) for size, _ in found)


@pytest.mark.parametrize(
    ("text", "size"),
    [(0, 0), (4096, 4096), ("4096", 4096), ("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("2 GB", 2 * 10**9), ("7kb", 7000)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text, "") == size
    assert Options.parse({"fold_memory": text}, environ={}).fold_memory == size
    assert Options.parse({"fold_memory": 1}, environ={"NORMFX_FOLD_MEMORY": str(text)}).fold_memory == size


@pytest.mark.parametrize("text", [-1, True, 2.5, "much", "1 PB", "GiB", None, "auto"])
def test_other_sizes(text: object) -> None:
    if text in (None, "auto"):
        assert Options.parse({"fold_memory": text}, environ={}).fold_memory is None
        return
    with pytest.raises(OptionError, match="number of bytes"):
        Options.parse({"fold_memory": text}, environ={})
