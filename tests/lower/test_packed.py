"""Linear layers that multiply by packed weights: right on the next call after every write, and only where sound."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_low_precision
from folding import X, check, compiled, folding, net
from models import CASES, Case
from packing import HAS_MKL, PRODUCTS, Reads, count, pack_all
from torch import Tensor, nn
from writes import WRITES

from normfx.compat import onednn
from normfx.lower import gemm, packed, packing, rates
from normfx.weights import handles, store

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture(params=["oneDNN", pytest.param("MKL", marks=HAS_MKL)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that float32 weights are packed for, where the number of rows is fixed."""
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: request.param == "MKL")
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _packs(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_all(monkeypatch)


def packed_products(model: Callable[..., Any], *inputs: Any) -> int:
    """How many products of a graph without gradients are packed; its outputs agree with the model's own."""
    backend = EagerBackend({"fold": "cached"})
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        torch.testing.assert_close(actual, model(*inputs), rtol=1e-4, atol=1e-4)
    return count(backend)


# ---------------------------------------------------------------- true to the weights


@pytest.mark.parametrize("name", WRITES)
def test_next_call_after_a_write(name: str, library: str) -> None:
    model = net(dtype=torch.float32)
    call = compiled(model, "cached")
    before = check(call, model)
    assert sum(entry.value is not None and entry.value.dtype == torch.int64 for entry in store.STORE.entries()) == 4
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    check(call, model, before)
    check(call, model)


QUICK = {"gpt2", "torchvision vit"}
SOME = [pytest.param(c, id=c.name.replace(" ", "-"), marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.slow, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")],
)
@pytest.mark.parametrize("case", SOME)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """As the live folds are judged, in tests/models/test_models.py."""
    backend = EagerBackend({"fold": "cached"})
    assert_low_precision(case.make(), case.batches(), backend, dtype)
    assert (count(backend) > 0) == gemm.onednn_works(dtype) or not case.to_rms  # else the graph may be untouched


def test_only_what_changed_is_packed_anew() -> None:
    model = net(dtype=torch.float32)
    call = compiled(model, "cached")
    check(call, model)
    first = folding().refreshes
    model.head.weight.data.mul_(2.0)  # the packed W·γ, and c + Wβ
    check(call, model)
    assert folding().refreshes == first + 2


def test_handles_stay_and_packed_weights_go_with_the_model() -> None:
    assert not handles._VALUES
    run = torch.compile(
        lambda model, x: model(x), backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True}
    )
    keep = net(dtype=torch.float32)
    with torch.no_grad():
        run(keep, X.float())
        size = store.STORE.bytes
        before = dict(handles._VALUES)
        assert len(before) == 4 and size > sum(p.nbytes for p in before.values()) > 4 * 5 * 16
        for seed in range(1, 4):
            run(net(seed, torch.float32), X.float())
        run(keep, X.float())
    gc.collect()
    assert store.STORE.bytes == size and handles._VALUES.keys() == before.keys()
    WRITES["p.data = t"](keep)
    with torch.no_grad():
        torch.testing.assert_close(run(keep, X.float()), keep(X.float()), rtol=1e-4, atol=1e-4)
    del run
    torch._dynamo.reset()
    gc.collect()
    assert not handles._VALUES


def test_two_callables_share_packed_weights() -> None:
    model = net(dtype=torch.float32)
    check(compiled(model, "cached"), model)
    size = store.STORE.bytes
    check(compiled(lambda x: model(x), "cached"), model)
    assert store.STORE.bytes == size


def test_threads() -> None:
    """Not with fullgraph=True: called by several threads, torch 2.11 stops compiling at graph breaks."""
    model = net(dtype=torch.float32)
    graph = torch.compile(model, backend="normfx", options={"fold": "cached", "strict": True})

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return graph(x)

    check(call, model)
    failures: list[BaseException] = []

    def caller() -> None:
        try:
            for _ in range(50):
                check(call, model)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---------------------------------------------------------------- which products


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, library: str) -> None:
    product, packs = PRODUCTS[name]
    assert packed_products(Reads(product), torch.randn(3, 5, 8)) == 1 + packs


@pytest.mark.parametrize("plain", [False, True])
def test_one_row(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is multiplied by a weight packed for one row, or by the weight itself where that is as fast."""
    monkeypatch.setattr(rates, "plain_row_is_fast", lambda: plain)
    hints: list[int] = []
    pack = onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda weight, rows: hints.append(rows) or pack(weight, rows))
    model = Reads(PRODUCTS["linear"][0])
    assert packed_products(model, torch.randn(1, 1, 8)) == (0 if plain else 2)
    assert hints == ([] if plain else [1, 1])
    assert packed_products(model, torch.randn(2, 1, 8)) == 2 and hints[-2:] == [packed.ROWS] * 2


def test_not_in_double() -> None:
    assert packed_products(Reads(PRODUCTS["linear"][0]).double(), torch.randn(3, 5, 8).double()) == 0


def test_not_under_autocast() -> None:
    """The product then has another dtype than its weight."""
    model = Reads(PRODUCTS["linear"][0])
    backend = EagerBackend({"fold": "cached"})
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = torch.compile(model, backend=backend, fullgraph=True)(x)
        expected = model(x)
    assert actual[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert count(backend) == 0


def test_not_where_gradients_are_recorded() -> None:
    model = Reads(PRODUCTS["linear"][0]).requires_grad_(False)
    backend = EagerBackend({"fold": "cached"})
    x = torch.randn(3, 5, 8, requires_grad=True)
    sum(torch.compile(model, backend=backend, fullgraph=True)(x)).sum().backward()
    own = x.grad
    x.grad = None
    sum(model(x)).sum().backward()
    torch.testing.assert_close(own, x.grad, rtol=1e-4, atol=1e-4)
    assert count(backend) == 0


def test_small_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST", {torch.float32: 65})
    assert packed_products(Reads(PRODUCTS["linear"][0]), torch.randn(3, 5, 8)) == 0


class Activated(nn.Module):
    """A layer of a norm's output, and what becomes of its result."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.layer, self.use = nn.LayerNorm(8), nn.Linear(8, 8), use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.layer(self.norm(x)))


gelu = torch.nn.functional.gelu

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "gelu": (gelu, True),
    "of a view": (lambda h: gelu(h.transpose(0, 1)), False),
    "with tanh": (lambda h: gelu(h, approximate="tanh"), False),
    "read twice": (lambda h: gelu(h) * h, False),
    "returned, too": (lambda h: (gelu(h), h), False),
    "relu": (torch.relu, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("memory", [None, 0])
def test_activations(name: str, memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU with erf goes into the product that alone feeds it, as exact as eager's, and NaN reaches what it reaches."""
    monkeypatch.setattr(packed, "gelu_is_faster", lambda dtype: True)
    torch.manual_seed(0)
    use, inside = ACTIVATIONS[name]
    model, x = Activated(use), 3 * torch.randn(4, 5, 8)
    x[0, 0, 0] = math.nan
    backend = EagerBackend({"fold": "cached", "strict": True, **({} if memory is None else {"fold_memory": memory})})
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), rtol=1e-5, atol=1e-6, equal_nan=True)
    (module,) = backend.modules
    found = any(node.target is packed.PACKED_LINEAR and True in node.args[5:] for node in module.graph.nodes)
    assert found == (inside and memory is None) and count(backend) == (memory is None)


def test_a_gelu_is_measured() -> None:
    with torch.inference_mode(), torch.autocast("cpu"):
        assert gemm.gelu_is_faster(torch.float32) in (True, False)


def test_any_number_of_rows() -> None:
    model = net(dtype=torch.float32)
    call = torch.compile(model, backend="normfx", dynamic=True, options={"fold": "cached", "strict": True})
    with torch.no_grad():
        for rows in (3, 1, 300, 2):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        model = net(dtype=torch.float32)
        call = torch.compile(model, backend="normfx", options={"fold": "cached", "strict": True})
        for _ in range(2):
            torch.testing.assert_close(call(X.float()), model(X.float()), rtol=1e-4, atol=1e-4)
            model.up.weight.view(-1)[5] += 2.0


@pytest.mark.skipif(os.name == "nt", reason="Inductor's C++ wrapper is for Linux")
@pytest.mark.parametrize("fold", ["cached", "live"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_in_a_cpp_wrapper(dynamic: bool, fold: str) -> None:
    model = net(dtype=torch.float32)
    options = {"fold": fold, "strict": True, "inductor": {"cpp_wrapper": True}}
    call = torch.compile(model, backend="normfx", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for rows in (3, 2):
            torch.testing.assert_close(call(X[:rows].float()), model(X[:rows].float()), rtol=1e-4, atol=1e-4)
        WRITES["p.data.add_"](model)
        torch.testing.assert_close(call(X.float()), model(X.float()), rtol=1e-4, atol=1e-4)


def test_the_measurement_is_on_the_cpu() -> None:
    """Whatever the default device is when a model is compiled."""
    with torch.device("meta"):
        assert {tensor.device.type for tensor in gemm.layer(torch.float32)} == {"cpu"}


def test_a_torch_without_onednn() -> None:
    """Its ops are not there: normfx is imported, compiles, and packs nothing."""
    code = """
import torch
real = torch.ops.mkldnn
class Without:
    def __getattr__(self, name):
        if "linear" in name:
            raise AttributeError(name)
        return getattr(real, name)
torch.ops.mkldnn = Without()
torch._C._has_mkldnn = False
torch.backends.mkldnn.is_available = lambda: False
torch._inductor.config.freezing = False
import normfx
from normfx import backend
from normfx.options import Options
seen = []
def compile_only(gm, inputs):
    ready = backend.transform(gm, inputs, Options.parse({"strict": True, "fold": "cached"}, environ={}))
    seen.append(ready)
    from normfx.lower.folded import fed
    return fed(ready.graph_module.forward, ready.folding)
model = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.LayerNorm(512), torch.nn.Linear(512, 512))
x = torch.randn(4, 8)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend=compile_only)(x), model(x), rtol=1e-4, atol=1e-4)
assert seen[0].report.sites[0].rules and "packed" not in str(seen[0].graph_module.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
