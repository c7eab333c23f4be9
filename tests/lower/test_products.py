"""Float32 products on oneDNN: the same results, where asked for or measured to be faster, and kept measurements."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import Marks
from measuring import another_process, fresh_measurements
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import normfx
from normfx.compat import onednn
from normfx.lower import measurements, products, rates
from normfx.lower.passes import HOOK
from normfx.lower.products import ADDMM, MM, WIDE_ADDMM, WIDE_MM, FasterProducts, plain_rows, with_products
from normfx.lower.rates import Product

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_measurements(monkeypatch, tmp_path)


def traced(body: Any, *inputs: Any) -> GraphModule:
    return make_fx(body, tracing_mode="fake")(*inputs)


def onednn_products(gm: GraphModule) -> list[Any]:
    """Apply the pass to a graph, whatever is faster, and list the products that it replaced."""
    FasterProducts(measured=False)(gm.graph)
    gm.recompile()
    return [node.target for node in gm.graph.nodes if node.target in (MM, ADDMM)]


LEFT, RIGHT, BIAS = torch.randn(256, 512), torch.randn(512, 384), torch.randn(384)
BIASES = {"none": None, "dense": BIAS, "strided": torch.randn(384, 2)[:, 0], "one number": torch.randn(1).expand(384)}


@pytest.mark.parametrize("transposed", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_the_same_result(bias: Tensor | None, transposed: tuple[int, ...]) -> None:
    """Every layout of both operands, with and without a bias, by its error against float64.

    oneDNN adds up to 1,024 products in one float32 sum where MKL adds 256: its error is up to 2.4 times MKL's.
    """
    a, b = (m.t().contiguous().t() if i in transposed else m for i, m in enumerate((LEFT, RIGHT)))

    inputs = (a, b) if bias is None else (bias, a, b)
    body = torch.mm if bias is None else torch.addmm
    gm = traced(body, *inputs)
    assert onednn_products(gm) == [MM if bias is None else ADDMM]
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    actual, eager = gm(*inputs), body(*inputs)
    assert actual.dtype == eager.dtype and actual.stride() == eager.stride()
    assert (actual - exact).square().mean().sqrt() <= 2.5 * (eager - exact).square().mean().sqrt()


def strided(rows: int, columns: int) -> dict[str, Tensor]:
    """A matrix in each way that one may lie in memory, without entries that overlap in part."""
    return {
        "dense": torch.randn(rows, columns),
        "transposed": torch.randn(columns, rows).t(),
        "every second column": torch.randn(rows, 2 * columns)[:, ::2],
        "every second row": torch.randn(2 * rows, columns)[::2],
        "a part": torch.randn(rows + 2, columns + 5)[1:-1, 3 : 3 + columns],
        "a part, transposed": torch.randn(columns, rows + 3)[:, 2 : 2 + rows].t(),
        "one row": torch.randn(1, columns).expand(rows, columns),
        "one column": torch.randn(rows, 1).expand(rows, columns),
    }


@pytest.mark.parametrize("left", strided(1, 1))
def test_operands_in_any_layout(left: str) -> None:
    """oneDNN's op itself, with weights packed and as they are."""
    a = strided(33, 70)[left]
    windows = torch.randn(102).as_strided((33, 70), (1, 1))
    for b in strided(70, 48).values():
        for bias in (None, torch.randn(48), torch.randn(48, 2)[:, 1], torch.randn(1).expand(48)):
            exact = a.double() @ b.double() + (0 if bias is None else bias.double())
            packed = onednn.pack(b.t().contiguous(), 33)
            torch.testing.assert_close(rates.onednn(a, b, bias).double(), exact, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(onednn.linear(a, packed, bias).double(), exact, rtol=1e-4, atol=1e-4)
            exact = windows.double() @ b.double() + (0 if bias is None else bias.double())
            torch.testing.assert_close(onednn.linear(windows, packed, bias).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("why", "body", "inputs"),
    [
        ("float64", torch.mm, (LEFT.double(), RIGHT.double())),
        ("bfloat16", torch.mm, (LEFT.bfloat16(), RIGHT.bfloat16())),
        ("small", torch.mm, (LEFT[:24], RIGHT)),
        ("few rows, a small matrix", torch.mm, (LEFT[:1], RIGHT)),
        ("a matrix is added", torch.addmm, (torch.randn(256, 384), LEFT, RIGHT)),
        ("one number is added", torch.addmm, (torch.randn(1), LEFT, RIGHT)),
        ("a factor", lambda *args: torch.addmm(*args, alpha=2), (BIAS, LEFT, RIGHT)),
        ("windows over a vector", torch.mm, (LEFT, torch.randn(896).as_strided((512, 384), (1, 1)))),
        ("batched", torch.bmm, (LEFT.expand(2, 256, 512), RIGHT.expand(2, 512, 384))),
    ],
)
def test_left_alone(why: str, body: Any, inputs: tuple[Tensor, ...]) -> None:
    gm = traced(body, *inputs)
    assert onednn_products(gm) == []
    torch.testing.assert_close(gm(*inputs), body(*inputs))


@pytest.mark.parametrize("op", [MM, ADDMM])
@pytest.mark.parametrize("sizes", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (1, 5, 1)])
def test_no_rows_at_all(op: Any, sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    bias = [torch.randn(columns)] if op is ADDMM else []
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    torch.testing.assert_close(op(*bias, a, b), torch.addmm(*bias, a, b) if bias else a @ b)


@pytest.mark.parametrize("rows", [1, 3, rates.FEW_ROWS])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows(rows: int, transposed: bool) -> None:
    """Decoding reads a weight for a few rows: oneDNN may, though there is little to compute. Its error is about
    that of adding one product after another; MKL's is smaller where it adds 16 sums side by side."""
    weight = torch.randn(768, 512)
    a, b = LEFT[:rows], weight.t() if transposed else torch.randn(512, 768)
    gm = traced(torch.mm, a, b)
    assert onednn_products(gm) == [MM]
    exact, actual, eager = a.double() @ b.double(), gm(a, b), a @ b
    assert actual.shape == eager.shape and actual.stride() == eager.stride()
    plain = torch.zeros_like(eager)
    for i in range(a.shape[1]):
        plain += a[:, i : i + 1] * b[i]
    assert (actual - exact).square().mean().sqrt() <= 1.5 * (plain - exact).square().mean().sqrt()


def test_few_rows_are_measured_with_a_matrix_that_is_read_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that no cache holds together, not one that stays there."""
    read: list[int] = []
    monkeypatch.setattr(rates, "_each", lambda multiply, a, copies: read.append(sum(b.nbytes for b in copies)))
    monkeypatch.setattr(rates, "_best", lambda *calls: (float(len([call() for call in calls])), 1.0))
    assert rates._measure(Product(1, 1024, 2048, False, True)) == (2.0, 1.0)
    assert rates._measure(Product(64, 1024, 2048, False, True)) == (2.0, 1.0)
    assert read == [rates.READ_BYTES] * 2 + [4 * 1024 * 2048] * 2


def test_only_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {Product(256, 512, 512, False, True)}
    monkeypatch.setattr(rates, "_measure", lambda product: (0.9 if product in slower else 2.0, 1.0))
    gm = traced(lambda a, b, c: (a @ b, a @ c.t()), LEFT, RIGHT, RIGHT.t().contiguous())
    FasterProducts(measured=True)(gm.graph)
    assert [node.target for node in gm.graph.nodes if node.target in (MM, ADDMM, torch.ops.aten.mm.default)] == [
        MM,
        torch.ops.aten.mm.default,
    ]


# ---------------------------------------------------------------- bfloat16 in float32


@pytest.mark.parametrize("transposed", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_bfloat16_in_float32(bias: Tensor | None, transposed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as eager's product of bfloat16 matrices: both add in float32 and round once."""
    monkeypatch.setattr(rates, "wide_is_faster", lambda product: True)
    a, b = (m.bfloat16().t().contiguous().t() if i in transposed else m.bfloat16() for i, m in enumerate((LEFT, RIGHT)))
    inputs = (a, b) if bias is None else (bias.bfloat16(), a, b)
    body = torch.mm if bias is None else torch.addmm
    gm = traced(body, *inputs)
    FasterProducts(measured=True)(gm.graph)
    gm.recompile()
    assert [n.target for n in gm.graph.nodes if n.target in (WIDE_MM, WIDE_ADDMM)] == [
        WIDE_ADDMM if bias is not None else WIDE_MM
    ]
    exact = body(*(t.double() for t in inputs))
    actual, eager = gm(*inputs), body(*inputs)
    assert actual.dtype == eager.dtype and actual.stride() == eager.stride()
    assert (actual - exact).square().mean().sqrt() <= 1.01 * (eager - exact).square().mean().sqrt()


def test_bfloat16_only_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {Product(256, 512, 512, False, True)}
    monkeypatch.setattr(rates, "_measure", lambda product, *way: (0.9 if product in slower else 2.0, 1.0))
    wide, narrow = RIGHT.bfloat16(), RIGHT.t().contiguous().bfloat16()
    gm = traced(lambda a, b, c: (a @ b, a @ c.t(), a[:16] @ b), LEFT.bfloat16(), wide, narrow)
    FasterProducts(measured=True)(gm.graph)
    found = [node.target for node in gm.graph.nodes if node.target in (WIDE_MM, torch.ops.aten.mm.default)]
    assert found == [WIDE_MM, torch.ops.aten.mm.default, torch.ops.aten.mm.default]  # the last has few rows


@pytest.mark.parametrize("sizes", [(0, 5, 7), (4, 0, 7), (4, 5, 0), (1, 5, 1)])
def test_bfloat16_of_no_rows_at_all(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    torch.testing.assert_close(WIDE_MM(a, b), a @ b)
    torch.testing.assert_close(WIDE_ADDMM(b.new_ones(columns), a, b), a @ b + 1)


# ---------------------------------------------------------------- measurements


def test_measured_once_and_read_by_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    product, asked = Product(96, 300, 200, False, True), []
    monkeypatch.setattr(rates, "_measure", lambda of_class: asked.append(of_class) or (3.0, 2.0))
    assert rates.onednn_is_faster(product) and rates.onednn_is_faster(product._replace(rows=100))
    assert asked == [Product(128, 256, 256, False, True)]
    another_process(monkeypatch)
    assert rates.onednn_is_faster(product) and len(asked) == 1
    assert rates.measured() == {asked[0]: 1.5}
    assert not rates.onednn_is_faster(product._replace(inner=3000)) or len(asked) == 2
    torch.set_num_threads(threads := torch.get_num_threads() + 1)
    try:
        rates.onednn_is_faster(product)
    finally:
        torch.set_num_threads(threads - 1)
    assert len(asked) == 3  # with other threads it is another machine


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {}}', "{", '{"64 64 64 0 0": "fast"}', '{"64 64 64 0 0": 0.5}'])
def test_a_broken_file_is_measured_again(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_measure", lambda of_class: (3.0, 2.0))
    measurements.path(rates.FILE).parent.mkdir(parents=True)
    measurements.path(rates.FILE).write_text(content)
    assert rates.onednn_is_faster(Product(64, 64, 64, False, False))
    assert json.loads(measurements.path(rates.FILE).read_text())["64 64 64 0 0"] == [3.0, 2.0, 1, 1]


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measurements, "cache_dir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr(rates, "_measure", lambda of_class: (3.0, 2.0))
    assert rates.onednn_is_faster(Product(64, 64, 64, False, False))


def test_a_measurement_leaves_nothing_in_a_graph() -> None:
    """Also while a graph is traced, under autocast, inference mode and another default dtype."""

    def body(x: Tensor) -> Tensor:
        assert all(0 < seconds < 100 for seconds in rates._measure(Product(64, 64, 64, True, False)))
        return x + 1

    with torch.inference_mode(), torch.autocast("cpu"):
        gm = traced(body, LEFT)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]


_sizes = st.integers(1, 60_000)


@given(_sizes, _sizes, _sizes)
def test_classes(rows: int, inner: int, columns: int) -> None:
    """Bounded work; a class is its own class; sizes stay near, or are large ones that were reduced."""
    of_class = rates._class(Product(rows, inner, columns, False, True))
    assert 2 * of_class.rows * of_class.inner * of_class.columns <= rates.MOST
    assert of_class.rows > rates.FEW_ROWS or of_class.inner * of_class.columns <= rates.MOST_READ
    assert rates._class(of_class) == of_class
    for size, reduced in zip((rows, inner, columns), of_class[:3], strict=True):
        assert reduced <= 1.5 * size and (reduced >= 0.66 * size or reduced >= 256)


# ---------------------------------------------------------------- Inductor


def test_a_pass_of_the_users_runs_first() -> None:
    marks = Marks()
    patches = with_products({HOOK: marks}, "onednn")
    gm = traced(torch.mm, LEFT, RIGHT)
    patches[HOOK](gm.graph)
    assert marks.seen == 1 and [n.target for n in gm.graph.nodes if n.op == "call_function"] == [MM]
    assert "marks" in patches[HOOK].uuid()
    assert with_products({HOOK: Marks(None)}, "onednn")[HOOK].uuid() is None  # it may not be cached
    assert with_products({}, "onednn")[HOOK].uuid() != with_products({}, "auto")[HOOK].uuid()


@pytest.mark.parametrize("fast", [True, False])
def test_plain_rows(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row needs no packed weight only where the pass runs, and where the machine was measured to be as fast."""
    monkeypatch.setattr(measurements, "least", lambda name, key, measure: (1.0, 1.05 if fast else 1.2))
    rates.plain_row_is_fast.cache_clear()
    try:
        assert plain_rows({}, "auto")(torch.float32) == fast
        assert not plain_rows({}, "auto")(torch.bfloat16)
        assert not plain_rows({}, "aten")(torch.float32)
        assert not plain_rows({"max_autotune": True}, "auto")(torch.float32)
        assert plain_rows({"max_autotune": True}, "onednn")(torch.float32) == fast
    finally:
        rates.plain_row_is_fast.cache_clear()


def test_a_row_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "READ_BYTES", 2**24)
    rates.plain_row_is_fast.cache_clear()
    try:
        assert rates.plain_row_is_fast() in (True, False)
        packed, plain, quiet, tries = json.loads(measurements.path(rates.FILE_ROW).read_text())[
            "float32 row, packed and plain"
        ]
        assert packed > 0 and plain > 0 and quiet in (0, 1) and tries == 1
    finally:
        rates.plain_row_is_fast.cache_clear()


def test_switched_off() -> None:
    assert with_products({"epilogue_fusion": True}, "aten") == {"epilogue_fusion": True}
    assert with_products({"max_autotune": True}) == {"max_autotune": True}
    assert HOOK in with_products({"max_autotune": True}, "onednn")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_training_under_inductor(dynamic: bool) -> None:
    """Products of forward and backward run on oneDNN; the error is that of Inductor's own products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256))
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="normfx", dynamic=dynamic, options={"products": "onednn", "strict": True})
    errors = []
    for run in (model, compiled):
        x = torch.randn(640, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
        wide = x.detach().double().requires_grad_()

        def step(run: Any = run, x: Tensor = x) -> Tensor:
            run(x).square().sum().backward()
            return x

        _, codes = run_and_get_code(step)
        exact(wide).square().sum().backward()
        pairs = [
            (x.grad, wide.grad),
            *((p.grad, q.grad) for p, q in zip(model.parameters(), exact.parameters(), strict=True)),
        ]
        errors.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        model.zero_grad()
        exact.zero_grad()
    text = "".join(codes)
    assert text.count("normfx.addmm.default(") == 2 and text.count("normfx.mm.default(") == 4
    assert errors[1] <= 2 * errors[0]
    with torch.no_grad():
        few = torch.randn(3, 256)
        torch.testing.assert_close(compiled(few), model(few), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_normfx_measures_nothing_when_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(rates, "_measure", lambda product: pytest.fail("measured"))
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))
    torch.compile(model, backend=normfx.backend.normfx, options={"products": "aten"})(torch.randn(4, 32))
