"""MKL's form of kept weights: for one number of rows, right after every write, no larger than the weight."""

from __future__ import annotations

import pytest
import torch
from equivalence import EagerBackend
from folding import X, compiled, net
from packing import HAS_MKL, PRODUCTS, Reads, pack_all, rows_of
from torch import Tensor
from writes import WRITES

from normfx.lower import gemm, packed
from normfx.weights import handles

pytestmark = [
    HAS_MKL,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"),
]


@pytest.fixture(autouse=True)
def _packs(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_all(monkeypatch, mkl=True)


def test_one_number_of_rows() -> None:
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
def test_rows_that_are_not_fixed(name: str) -> None:
    model, backend = Reads(PRODUCTS[name][0]), EagerBackend({"fold": "cached"})
    call = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.randn(rows, 5, 8)
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    assert rows_of(backend) == {0: 2}


def test_other_rows_raise() -> None:
    """MKL's product by what is packed for others would be wrong."""
    handle = torch.zeros(1, dtype=torch.int64)
    handles.set_value(handle, packed._pack(torch.randn(6, 8), 0, 4, True))
    assert packed._packed_linear(torch.randn(2, 2, 8), handle, None, 6, 4).shape == (2, 2, 6)
    with pytest.raises(RuntimeError, match="packed for 4 rows"):
        packed._packed_linear(torch.randn(5, 8), handle, None, 6, 4)


def test_memory() -> None:
    """What is counted is what is written: MKL asks for more address space than it uses."""
    weight, handle = torch.randn(384, 384), torch.zeros(1, dtype=torch.int64)
    value = packed._pack(weight, 1, 64, True)
    handles.set_value(handle, value)
    assert value.nbytes > handles.size_in_bytes(handle) == weight.nbytes


@pytest.mark.parametrize("out", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (7, 300, 700), (197, 384, 96), (64, 1000, 33)])
def test_the_product(sizes: tuple[int, int, int], out: int) -> None:
    rows, width, features = sizes
    x, bias = torch.randn(rows, width), torch.randn(features)
    weight = torch.randn(width, features) if out else torch.randn(features, width)
    handle = torch.zeros(1, dtype=torch.int64)
    handles.set_value(handle, packed._pack(weight, out, rows, True))
    exact = x.double() @ (weight if out else weight.t()).double() + bias
    actual = packed._packed_linear(x, handle, bias, features, rows).double()
    plain = torch.addmm(bias, x, weight if out else weight.t()).double()
    assert (actual - exact).norm() <= 1.25 * (plain - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("name", WRITES)
def test_two_lengths_and_a_write(name: str) -> None:
    """Graphs that hold the same weights in two forms are both right at the next call after a write."""
    model = net(dtype=torch.float32)
    call = compiled(model, "cached")
    inputs = [X.float(), torch.cat([X, 2 * X]).float()]
    for x in inputs:
        torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)
    before = model(inputs[0])
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    assert (model(inputs[0]) - before).abs().max() > 1e-3, "the write does not show"
    for x in reversed(inputs):
        torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)


def test_packed_forms_are_compared_by_weights_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weights in turn, not one that stays in a cache."""
    found: list[list[Tensor]] = []
    monkeypatch.setattr(gemm, "least", lambda file, key, measure: measure())
    monkeypatch.setattr(gemm, "best", lambda *calls: (found.extend(call() for call in calls), (1.0, 1.0))[1])
    assert gemm._packed_forms.__wrapped__() == (1.0, 1.0)
    assert len(found) == 2 and gemm.COPIES * gemm.IN * gemm.OUT * 4 >= 2**25
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
