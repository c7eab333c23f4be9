"""Linear layers that multiply by packed weights: right on the next call after every write, and only where sound."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_low_precision
from folding import X, check, compiled, folding, net
from models import CASES, Case
from torch import Tensor, nn
from writes import WRITES

from normfx.compat import onednn
from normfx.lower import gemm, packed, rates
from normfx.weights import handles, store

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


HAS_MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch was built without MKL")


@pytest.fixture(params=["oneDNN", pytest.param("MKL", marks=HAS_MKL)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that float32 weights are packed for, where the number of rows is fixed."""
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: request.param == "MKL")
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def _packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack small weights too, whatever this machine is fast at, in the dtypes that its oneDNN can pack."""
    monkeypatch.setattr(packed, "packed_is_faster", gemm.onednn_works)
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: False)
    monkeypatch.setattr(rates, "plain_row_is_fast", lambda: False)
    monkeypatch.setattr(packed, "LEAST", dict.fromkeys(packed.LEAST, 1))


def packed_products(model: Callable[..., Any], *inputs: Any) -> int:
    """How many products of a graph without gradients are packed; its outputs agree with the model's own."""
    backend = EagerBackend({"fold": "cached"})
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
        torch.testing.assert_close(actual, model(*inputs), rtol=1e-4, atol=1e-4)
    return count(backend)


def count(backend: EagerBackend) -> int:
    """Of the one graph."""
    return sum(rows_of(backend).values())


def rows_of(backend: EagerBackend) -> Counter[int]:
    """How many products of the one graph there are by weights packed for a number of rows; 0: for any, by oneDNN."""
    (module,) = backend.modules
    found = [node for node in module.graph.nodes if node.target is packed.PACKED_LINEAR]
    return Counter(int(node.args[4]) if len(node.args) > 4 else 0 for node in found)


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
    model = net(dtype=torch.float32)
    call = compiled(model, "cached")
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


class Reads(nn.Module):
    """A norm whose output is read by a packed linear layer, and multiplied in a way that is given."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.product, self.read = nn.LayerNorm(8), product, nn.Linear(8, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor) -> Any:
        return self.product(self.norm(x), self.weight, self.bias), self.read(self.norm(x))


linear = nn.functional.linear

PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {
    "linear": (lambda y, w, b: linear(y, w, b), 1),
    "no bias": (lambda y, w, b: linear(y, w), 1),
    "addmm": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w), 1),
    "addmm of a transpose": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w.t()), 1),
    "scaled addmm": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w, alpha=2), 0),
    "addmm with a matrix": (lambda y, w, b: torch.addmm(b.expand(15, 8), y.flatten(0, 1), w), 0),
    "used twice": (lambda y, w, b: linear(torch.tanh(linear(y, w, b)), w), 2),
    "input transposed": (lambda y, w, b: linear(torch.tanh(y).transpose(0, 1), w, b), 1),
    "input broadcast": (lambda y, w, b: linear(torch.tanh(y)[:, :1].expand(3, 4, 8), w, b), 1),
    "no rows": (lambda y, w, b: linear(y[:0], w, b), 1),
    "one dimension": (lambda y, w, b: linear(torch.tanh(y)[0, 0], w, b), 0),
    "weight is an activation": (lambda y, w, b: linear(y, torch.tanh(y[0, :4]) @ w), 0),
    "view of the weight returned": (lambda y, w, b: (linear(torch.tanh(y), w, b), w.t()), 0),
    "weight written": (lambda y, w, b: linear(torch.tanh(y), w.mul_(1.0), b), 0),
}


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
    monkeypatch.setattr(packed, "LEAST", {torch.float32: 65})
    assert packed_products(Reads(PRODUCTS["linear"][0]), torch.randn(3, 5, 8)) == 0


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
def test_in_a_cpp_wrapper() -> None:
    model = net(dtype=torch.float32)
    call = compiled(model, "cached", inductor={"cpp_wrapper": True})
    before = check(call, model)
    WRITES["p.data.add_"](model)
    check(call, model, before)


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


# ---------------------------------------------------------------- MKL's form


@HAS_MKL
@pytest.mark.parametrize("library", ["MKL"], indirect=True)
class TestMKL:
    def test_one_number_of_rows(self, library: str) -> None:
        """A second length of the inputs is served by oneDNN's form, which takes any further one."""
        model = Reads(PRODUCTS["linear"][0])
        found = []
        for rows in (3, 4, 5, 3):
            backend = EagerBackend({"fold": "cached"})
            x = torch.randn(rows, 5, 8)
            torch._dynamo.reset()
            with torch.no_grad():
                torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=1e-4, atol=1e-4)
            found.append(rows_of(backend))
        assert found == [{15: 2}, {0: 2}, {0: 2}, {15: 2}]
        torch._dynamo.reset()
        other, backend = Reads(PRODUCTS["linear"][0]), EagerBackend({"fold": "cached"})
        with torch.no_grad():
            torch.compile(other, backend=backend)(torch.randn(4, 5, 8))
        assert rows_of(backend) == {20: 2}  # another model has a number of its own

    @pytest.mark.parametrize("name", ["linear", "no bias", "addmm"])
    def test_rows_that_are_not_fixed(self, name: str, library: str) -> None:
        model, backend = Reads(PRODUCTS[name][0]), EagerBackend({"fold": "cached"})
        call = torch.compile(model, backend=backend, dynamic=True)
        with torch.no_grad():
            for rows in (3, 7):
                x = torch.randn(rows, 5, 8)
                torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
        assert rows_of(backend) == {0: 2}

    def test_other_rows_raise(self, library: str) -> None:
        """MKL's product by what is packed for others would be wrong."""
        handle = torch.zeros(1, dtype=torch.int64)
        handles.set_value(handle, packed._pack(torch.randn(6, 8), 0, 4, True))
        assert packed._packed_linear(torch.randn(2, 2, 8), handle, None, 6, 4).shape == (2, 2, 6)
        with pytest.raises(RuntimeError, match="packed for 4 rows"):
            packed._packed_linear(torch.randn(5, 8), handle, None, 6, 4)

    def test_memory(self, library: str) -> None:
        """What is counted is what is written: MKL asks for more address space than it uses."""
        weight, handle = torch.randn(384, 384), torch.zeros(1, dtype=torch.int64)
        value = packed._pack(weight, 1, 64, True)
        handles.set_value(handle, value)
        assert value.nbytes > handles.size_in_bytes(handle) == weight.nbytes

    @pytest.mark.parametrize("out", [0, 1])
    @pytest.mark.parametrize("sizes", [(2, 1, 1), (7, 300, 700), (197, 384, 96), (64, 1000, 33)])
    def test_the_product(self, sizes: tuple[int, int, int], out: int, library: str) -> None:
        rows, width, features = sizes
        x, bias = torch.randn(rows, width), torch.randn(features)
        weight = torch.randn(width, features) if out else torch.randn(features, width)
        handle = torch.zeros(1, dtype=torch.int64)
        handles.set_value(handle, packed._pack(weight, out, rows, True))
        exact = x.double() @ (weight if out else weight.t()).double() + bias
        actual = packed._packed_linear(x, handle, bias, features, rows).double()
        plain = torch.addmm(bias, x, weight if out else weight.t()).double()
        assert (actual - exact).norm() <= 1.25 * (plain - exact).norm() + 1e-7 * exact.norm()


@HAS_MKL
def test_packed_forms_are_compared_by_weights_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weights in turn, not one that stays in a cache."""
    found: list[list[Tensor]] = []
    monkeypatch.setattr(gemm, "least", lambda file, key, measure: measure())
    monkeypatch.setattr(gemm, "best", lambda *calls: (found.extend(call() for call in calls), (1.0, 1.0))[1])
    assert gemm._packed_forms.__wrapped__() == (1.0, 1.0)
    assert len(found) == 2 and gemm.COPIES * gemm.IN * gemm.OUT * 4 >= 2**25
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
