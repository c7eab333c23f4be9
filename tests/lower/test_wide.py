"""Bfloat16 products and attention in float32: as exact as eager, true to the weights, and only where it is sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_low_precision
from folding import X, compiled, folding, net
from models import CASES, Case
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from writes import WRITES

from normfx.lower import affordable, gemm, packed, packing, wide, wide_speed
from normfx.weights import store

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _widens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen small products too, whatever this machine is fast at."""
    for module in (wide, affordable):
        monkeypatch.setattr(module, "products_gain", lambda: 1e-12, raising=False)
    monkeypatch.setattr(wide, "products_are_faster", lambda: True)
    monkeypatch.setattr(wide, "attention_is_faster", lambda: True)
    monkeypatch.setattr(packed, "packed_is_faster", gemm.onednn_works)
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: False)
    monkeypatch.setattr(packing, "LEAST", dict.fromkeys(packing.LEAST, 1))
    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "ROWS", 1)


def dtypes(module: GraphModule, *names: str) -> list[torch.dtype]:
    """The dtypes of the results of ops of these names."""
    return [node.meta["val"].dtype for node in module.graph.nodes if _name(node) in names]


def _name(node: Node) -> str:
    return getattr(node.target, "name", str)() if node.op == "call_function" else ""


PRODUCTS = "aten::linear", "aten::addmm", "normfx::packed_linear"
ATTENTION = "aten::scaled_dot_product_attention"

QUICK = {"gpt2", "torchvision vit", "llama"}
SOME = [pytest.param(c, id=c.name.replace(" ", "-"), marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", SOME)
def test_the_error_is_no_larger_than_eager_s(case: Case) -> None:
    backend = EagerBackend({"fold": "cached"})
    assert_low_precision(case.make(), case.batches(), backend, BFLOAT16)
    found = [dtype for module in backend.modules for dtype in dtypes(module, *PRODUCTS)]
    assert FLOAT32 in found or not case.to_rms  # else the graph may be untouched


def test_attention_reads_what_products_computed() -> None:
    """No value is cast between a product and attention, nor between attention and the next product."""
    (case,) = (c for c in CASES if c.name == "gpt2")
    backend = EagerBackend({"fold": "cached"})
    assert_low_precision(case.make(), case.batches(), backend, BFLOAT16)
    (module,) = backend.modules
    assert set(dtypes(module, "aten::embedding")) == {BFLOAT16}  # also of the tied table
    assert set(dtypes(module, ATTENTION)) == {FLOAT32}
    for node in module.graph.nodes:
        if _name(node) == ATTENTION:
            assert all(_name(_source(arg)) in PRODUCTS for arg in node.args[:3])


def _source(node: Any) -> Node:
    while _name(node) in wide.VIEWS or "getitem" in str(node.target):
        node = node.args[0]
    assert isinstance(node, Node)
    return node


@pytest.mark.parametrize("fold", ["cached", "frozen"])
def test_next_call_after_a_write(fold: str) -> None:
    """One write that bumps no version; how others are seen is tested for packed weights."""
    model, x = net(dtype=BFLOAT16), X.to(BFLOAT16)
    call = compiled(model, fold)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(call(x), before, rtol=0.03, atol=0.03)
    WRITES["p.data.add_"](model)
    with torch.no_grad():
        after = model(x)
        assert (after - before).abs().max() > 0.1, "the write does not show: the check could not fail"
        torch.testing.assert_close(call(x), after, rtol=0.03, atol=0.03)


def test_float32_copies_count_as_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def size() -> int:
        model = net(dtype=BFLOAT16, width=80)
        call = compiled(model, "cached")
        call(X.to(BFLOAT16))
        size = folding().bytes
        torch._dynamo.reset()
        return size

    wide_size = size()
    monkeypatch.setattr(wide, "products_are_faster", lambda: False)
    assert wide_size > 1.8 * size() or not gemm.onednn_works(BFLOAT16)


def test_without_memory_products_stay_as_they_are() -> None:
    model, x = net(dtype=BFLOAT16), X.to(BFLOAT16)
    backend = EagerBackend({"fold": "cached", "fold_memory": 300})
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(actual, model(x), rtol=0.03, atol=0.03)
    (module,) = backend.modules
    assert BFLOAT16 in dtypes(module, *PRODUCTS) and store.STORE.bytes <= 300


@pytest.mark.parametrize("reason", ["option", "live", "gradients", "autocast", "float16", "few rows"])
def test_left_alone(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16 if reason == "float16" else FLOAT32 if reason == "autocast" else BFLOAT16
    options = {"option": {"products": "aten"}, "live": {"fold": "live"}}.get(reason, {})
    if reason == "few rows":
        monkeypatch.setattr(wide, "ROWS", 4)
    backend = EagerBackend({"fold": "cached", **options})
    model = net(dtype=dtype)
    with torch.set_grad_enabled(reason == "gradients"), torch.autocast("cpu", BFLOAT16, reason == "autocast"):
        torch.compile(model, backend=backend, fullgraph=True)(X.to(dtype))
    casts = [n for module in backend.modules for n in module.graph.nodes if n.target is wide.CAST]
    assert backend.modules and not casts


# ---------------------------------------------------------------- the pass itself, on integers, where it gives the bits


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).to(BFLOAT16)


def _plain(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, w, c).relu(), w)


def _shared_operand(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    return functional.linear(x, w, c) + torch.addmm(c, x, w)


def _written_before_it_is_read(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The view shows what was written to the product's rounded result."""
    first = functional.linear(x, w, c)
    view = first.view(2, 2, 4)
    first.add_(1)
    return functional.linear(view, w)


def _slices(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    one, other = functional.linear(x, w, c).split(2, 0)
    return functional.linear(other.unsqueeze(0).transpose(0, 1), w) + one[:, None]


def _written_and_read_again(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """One reader before the write, one after it."""
    first = functional.linear(x, w, c)
    view = first.view(4, 4)
    before = functional.linear(view, w)
    first.add_(1)
    return before + functional.linear(first, w) + functional.linear(view, w, c)


def _written_weight(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    w.add_(1)
    return functional.linear(x, w, c)


BODIES = _plain, _shared_operand, _written_before_it_is_read, _written_and_read_again, _slices, _written_weight


@pytest.mark.parametrize("body", BODIES)
def test_the_same_bits(body: Any) -> None:
    given = integers(4, 4), integers(4, 4), integers(4)
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(*given)
    _, *weights = gm.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        wide.widen(gm, frozenset(weights))
        found = [node for node in gm.graph.nodes if node.target is wide.CAST]
        assert bool(found) == (body is not _written_weight)
        again = [t.clone() for t in given]
        assert torch.equal(gm(*[t.clone() for t in given]), body(*again))


def test_narrow_undoes_it() -> None:
    given = integers(4, 4), integers(4, 4), integers(4)
    gm = make_fx(_shared_operand, pre_dispatch=True, tracing_mode="fake")(*given)
    _, weight, bias = gm.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        wide.widen(gm, frozenset([weight, bias]))
        for cast in [user for user in weight.users if wide.is_wide(user)]:
            wide.narrow(gm, cast)
        gm.recompile()
        assert set(dtypes(gm, *PRODUCTS)) == {BFLOAT16}
        assert torch.equal(gm(*given), _shared_operand(*given))


@pytest.mark.parametrize("mask", [None, "bool", "bfloat16"])
def test_attention_with_masks(mask: str | None) -> None:
    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = None
        if mask is not None:
            given = k[..., 0].unsqueeze(-2) > 0 if mask == "bool" else k[..., 0].unsqueeze(-2)
        return functional.scaled_dot_product_attention(q, k, v, given, is_causal=mask is None, scale=0.3)

    q, k, v = (torch.randn(1, 2, 8, 16, dtype=BFLOAT16) for _ in range(3))
    k[0, 0, 0, 0] = k[0, 1, 0, 0] = 1.0  # no row of the mask is empty
    gm = make_fx(body, pre_dispatch=True, tracing_mode="fake")(q, k, v)
    with torch.no_grad():
        wide.widen(gm, frozenset())
        assert dtypes(gm, ATTENTION) == [FLOAT32]
        true = body(q.double(), k.double(), v.double())
        assert (gm(q, k, v) - true).norm() <= 1.01 * (body(q, k, v) - true).norm()


def test_speeds_are_positive() -> None:
    assert wide_speed.products_speed() > 0 and wide_speed.products_gain() >= 0
    assert isinstance(wide_speed.attention_is_faster(), bool)
