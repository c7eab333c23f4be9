"""torch.compile(..., backend="normfx") with real Inductor, in the situations that shape the capture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from blocks import Blocks, ids
from equivalence import EagerBackend, outputs_and_grads
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from normfx.backend import listening
from normfx.report import GraphReport, Report

OPTIONS = {"strict": True, "fold": "live"}


@pytest.fixture
def graphs() -> Iterator[list[GraphReport]]:
    """Reports of the graphs compiled in the test."""
    found: list[GraphReport] = []
    with listening(found.append):
        yield found


def _compile(model: Any, **kwargs: Any) -> Any:
    return torch.compile(model, backend="normfx", options=OPTIONS, **{"fullgraph": True, **kwargs})


def _counts(graphs: list[GraphReport]) -> tuple[int, int]:
    counts = Report(tuple(graphs)).counts
    return counts["layer_norm"], counts["to_rms_norm"]


@pytest.mark.parametrize(
    ("style", "converted", "folded"),
    [("plain", 3, 3), ("in place", 3, 3), pytest.param("checkpoint", 3, 3, marks=pytest.mark.slow), ("cond", 2, 3)],
)
def test_styles_in_float64(style: str, converted: int, folded: int, graphs: list[GraphReport]) -> None:
    """Checkpoints are written out. Other subgraphs are carried over whole, observe the stream they read and centre
    nothing; what is outside them is still rewritten."""
    model = Blocks(style).double()
    expected, expected_grads = outputs_and_grads(model, model, (ids(),))
    actual, grads = outputs_and_grads(_compile(model), model, (ids(),))
    counts = Report(tuple(graphs)).counts
    assert (counts["to_rms_norm"], counts.get("fold_affine", 0)) == (converted, folded)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-11, msg=name)


def test_graph_breaks(graphs: list[GraphReport]) -> None:
    """Each graph is rewritten by itself; a stream that crosses a break is an input and an output of graphs."""
    model = Blocks("break").double()
    expected, expected_grads = outputs_and_grads(model, model, (ids(),))
    actual, grads = outputs_and_grads(_compile(model, fullgraph=False), model, (ids(),))
    assert len(graphs) > 1 and all(site.rules or site.refusals for g in graphs for site in g.sites)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, graphs: list[GraphReport]) -> None:
    """In each dtype the result is as close to float64 as eager's."""
    exact = Blocks().double()
    model = copy.deepcopy(exact).to(dtype)
    reference = copy.deepcopy(model).double()(ids())
    eager = (model(ids()).double() - reference).norm()
    actual = _compile(model)(ids())
    assert actual.dtype == dtype and _counts(graphs) == (3, 3)
    assert (actual.double() - reference).norm() <= 2.0 * eager


def test_ambient_autocast(graphs: list[GraphReport]) -> None:
    """Folds are computed outside autocast's low precision, and dtypes of results stay eager's."""
    model = Blocks()
    reference = copy.deepcopy(model).double()(ids())
    compiled = _compile(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, actual = model(ids()), compiled(ids())
    assert actual.dtype == eager.dtype and _counts(graphs) == (3, 3)
    assert (actual.double() - reference).norm() <= 1.25 * (eager.double() - reference).norm()


def test_inner_autocast(graphs: list[GraphReport]) -> None:
    model = Blocks("autocast")
    reference = copy.deepcopy(model).double()
    reference.style = "plain"
    expected = reference(ids())
    actual = _compile(model)(ids())
    assert _counts(graphs) == (3, 3)
    assert (actual.double() - expected).norm() <= 1.25 * (model(ids()).double() - expected).norm()


def test_dynamic_shapes(graphs: list[GraphReport]) -> None:
    """One graph serves every length, its norms found and converted."""
    model = Blocks().double().eval()
    compiled = _compile(model, dynamic=True)
    for tokens in (5, 6, 9, 17):
        torch.testing.assert_close(compiled(ids(tokens, 3)), model(ids(tokens, 3)), rtol=1e-12, atol=1e-12)
    assert len({g.after for g in graphs}) == 1 and _counts(graphs[:1]) == (3, 3)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Any, graphs: list[GraphReport]) -> None:
    model = Blocks().double()
    with guard():
        expected = model(ids())
        actual = _compile(model)(ids())
    assert _counts(graphs) == (3, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class InnerGrad(nn.Module):
    """Gradients are switched on inside a call that was made without them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.first(x) + torch.tanh(self.second(x * 2.0))


def test_enable_grad_inside_no_grad() -> None:
    torch.manual_seed(0)
    model = InnerGrad().double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    backend = EagerBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected, actual = model(x), compiled(x)
    assert backend.report.counts["to_rms_norm"] == 2
    (want,) = torch.autograd.grad(expected.sum(), x)
    (got,) = torch.autograd.grad(actual.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class Mutating(nn.Module):
    """Writes its input and a buffer between two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        x.mul_(2.0)
        y = self.read(self.norm(x))
        x.add_(1.0)
        return y + self.read(self.norm(x + y)) + self.count


def test_input_and_buffer_mutation(graphs: list[GraphReport]) -> None:
    torch.manual_seed(0)
    model = Mutating().double().requires_grad_(False)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    mine, theirs = x.clone(), x.clone()
    compiled = _compile(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(mine), twin(theirs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(model.count, twin.count)
    assert _counts(graphs)[0] == 2


def test_weights_changed_between_calls() -> None:
    """Live folds read the parameters of each call: nothing can be stale."""
    model = Blocks().double()
    compiled = _compile(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        optimiser.zero_grad()
        compiled(ids()).square().sum().backward()
        optimiser.step()
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        model.final.weight.data.numpy()[:] = 3.0
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-11, atol=1e-11)


def test_training_with_dropout_draws_the_same_numbers(graphs: list[GraphReport]) -> None:
    """Random ops stay, in order: in eager lowering the masks are eager's, so results agree exactly."""

    class Dropping(Blocks):
        def branch(self, x: Tensor, i: int) -> Tensor:
            return F.dropout(super().branch(x, i), 0.3, self.training)

    model = Dropping().double().train()
    torch.manual_seed(5)
    expected = model(ids())
    backend = EagerBackend()
    torch.manual_seed(5)
    actual = torch.compile(model, backend=backend, fullgraph=True)(ids())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert backend.report.counts["layer_norm"] == 3


def test_norms_reach_inductor_in_a_form_that_fuses(graphs: list[GraphReport]) -> None:
    """On CPU the lookup, its centring, the residual add and the RMSNorm are one kernel; the folds are the other."""

    class AddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.write = nn.Embedding(9, 64), nn.Linear(64, 64)
            self.norm = nn.LayerNorm(64)

        def forward(self, ids: Tensor, a: Tensor) -> Tensor:
            return self.norm(self.table(ids) + self.write(a))

    with torch.no_grad():
        _, (code,) = run_and_get_code(_compile(AddNorm()), torch.arange(8), torch.randn(8, 64))
    assert _counts(graphs) == (1, 1)
    assert code.count("async_compile.cpp_pybinding(") == 2


def test_model_without_norms_is_compiled_unchanged(graphs: list[GraphReport]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    torch.testing.assert_close(_compile(model)(x), model(x))
    assert graphs[0].sites == () and graphs[0].before == graphs[0].after


def test_verify_option_runs_the_original_once() -> None:
    model = Blocks()
    compiled = torch.compile(model, backend="normfx", options={"strict": True, "verify": True}, fullgraph=True)
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mode_and_inductor_options_reach_inductor(graphs: list[GraphReport]) -> None:
    model = Blocks()
    compiled = torch.compile(
        model, backend="normfx", fullgraph=True, options={"inductor": {"fallback_random": True}, "mode": "default"}
    )
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="normfx", fullgraph=True, mode="reduce-overhead")
    torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-4)
    assert _counts(graphs) == (6, 6)
