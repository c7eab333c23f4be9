"""What capture must not look into: opaque functions, operators from outside torch.

Answers and gradients are the same, and nothing of the user's runs more often than with AOTAutograd alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from capturing import Backend, Model, Stack, same, x64
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, library, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from normfx.graph.opaque import calls_unknown

aten = torch.ops.aten

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

WRAPPERS = [
    torch.compiler.allow_in_graph,
    getattr(torch.compiler, "nonstrict_trace", None) or torch._dynamo.nonstrict_trace,
]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Observed(torch.autograd.Function):
    """Adds to buffers what it sees, in the forward and in the backward pass; nothing reads what the writes return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, slopes: Tensor) -> Tensor:
        seen.add_(x.abs().amax())
        ctx.save_for_backward(slopes)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        slopes.add_(grad.abs().amax())
        return grad, None, None


class Observing(Model):
    seen: Tensor
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("slopes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Observed.apply(self.first(x), self.seen, self.slopes))


def straight_through(x: Tensor) -> Tensor:
    return StraightThrough.apply(x) + x


def hooked(x: Tensor) -> Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: grad * 3)
    return y


def recomputed(x: Tensor) -> Tensor:
    return checkpoint(straight_through, x, use_reentrant=False) * 2


@functools.wraps(F.gelu)
def disguised(x: Tensor) -> Tensor:
    """Its __module__ is that of a function of torch."""
    return StraightThrough.apply(x)


def written(x: Tensor) -> Tensor:
    return x.mul_(2)


def viewed(x: Tensor) -> Tensor:
    return x.view(2, 2, 8).transpose(0, 1).reshape(4, 8)


def fresh(body: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A new function each time: Dynamo remembers what it was told about one."""
    copy = functools.partial(body)

    def function(x: Tensor) -> Tensor:
        return copy(x)

    return function


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("body", [straight_through, hooked, recomputed, written, viewed])
def test_opaque_function_keeps_its_gradients(wrap: Callable[..., Any], body: Callable[[Tensor], Tensor]) -> None:
    report = assert_same_float64(Model(wrap(fresh(body))), (x64(4, 8),))
    assert report.counts["to_rms_norm"] == 1


def test_opaque_function_inside_a_checkpoint() -> None:
    quantised = torch.compiler.allow_in_graph(fresh(straight_through))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(quantised)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.inner(x), use_reentrant=False)

    assert_same_float64(Outer(), (x64(4, 8),))


def test_opaque_function_on_a_stream_is_a_reader_of_its_mean() -> None:
    peek = torch.compiler.allow_in_graph(fresh(lambda x: x.mean(-1, keepdim=True)))

    class Peeking(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(self.norm(h)) + peek(h)

    report = assert_same_float64(Peeking(), (x64(4, 8),))
    assert report.counts["to_rms_norm"] == 0


def test_opaque_function_runs_as_often_as_without_normfx() -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(type(x))
        return StraightThrough.apply(x)

    def count(backend: Any) -> int:
        torch._dynamo.reset()
        calls.clear()
        torch.compile(Model(torch.compiler.allow_in_graph(counted)), backend=backend)(
            torch.randn(4, 8)
        ).sum().backward()
        return len(calls)

    assert count(aot_eager) == count(Backend())


def test_functions_of_torch_are_known() -> None:
    graph = torch.fx.Graph()
    known: list[Any] = [torch.add, F.linear, F.max_pool2d, F.layer_norm, torch.einsum, torch.fft.fft, torch.sym_max]
    known += [F.embedding, torch.linalg.norm, torch.Tensor.add, torch.Tensor.norm, getattr, torch.Size, torch.randn]
    assert not any(calls_unknown(graph.call_function(function)) for function in known)
    unknown: list[Any] = [disguised, hooked, dist.all_reduce, checkpoint, Model]
    assert all(calls_unknown(graph.call_function(function)) for function in unknown)
    given = graph.call_function(torch.sparse.mm, (fresh(hooked),))
    assert calls_unknown(given)


def test_custom_function_that_writes_to_buffers() -> None:
    """The writes stay in the bodies that the canonical graph carries."""
    same(Observing().double(), x64(4, 8, grad=True))


def test_custom_function_that_writes_to_buffers_in_a_rewritten_graph() -> None:
    model, x = Observing().double(), x64(4, 8)
    twin, backend = copy.deepcopy(model), EagerBackend()
    torch.compile(model, backend=backend, fullgraph=True)(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert backend.report.counts["to_rms_norm"] == 1
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert twin.seen > 0 and twin.slopes > 0


# ---------------------------------------------------------------- operators, hooks


CALLS = {"fake": 0, "setup": 0, "backward": 0, "written": 0}


@library.custom_op("normfx_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _twice_fake(x: Tensor) -> Tensor:
    CALLS["fake"] += 1
    return torch.empty_like(x)


def _twice_setup(ctx: Any, inputs: Any, output: Any) -> None:
    CALLS["setup"] += 1


def _twice_backward(ctx: Any, grad: Tensor) -> Tensor:
    CALLS["backward"] += 1
    return grad * 5


twice.register_autograd(_twice_backward, setup_context=_twice_setup)


@library.custom_op("normfx_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


@double_.register_fake
def _double_fake(x: Tensor) -> None:
    CALLS["written"] += 1


def test_operator_of_a_library_keeps_its_gradient() -> None:
    report = assert_same_float64(Model(fresh(lambda x: twice(x))), (x64(4, 8),))
    assert report.counts["to_rms_norm"] == 1


def test_operator_of_a_library_that_writes() -> None:
    class Writes(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x)).detach().clone()
            double_(h)
            return self.last(h) + self.norm(self.first(x))

    assert_same_float64(Writes(), (x64(4, 8),))


def test_formulas_of_an_operator_run_as_often_as_without_normfx() -> None:
    def count(backend: Any) -> dict[str, int]:
        torch._dynamo.reset()
        CALLS.update(dict.fromkeys(CALLS, 0))
        torch.compile(Model(twice), backend=backend)(torch.randn(4, 8)).sum().backward()
        return dict(CALLS)

    from normfx.capture.trace import capture

    def captured(gm: Any, example_inputs: Any) -> Any:
        return aot_eager(capture(gm, example_inputs).graph_module, example_inputs)

    assert count(aot_eager) == count(captured)


def test_saved_tensor_hooks_see_no_fakes() -> None:
    """A hook that reads the data would fail on a fake; a graph without a rewrite packs what it packs without normfx."""

    def count(backend: Any) -> int:
        torch._dynamo.reset()
        packed: list[Any] = []

        def pack(x: Tensor) -> Any:
            packed.append(type(x))
            return x.detach().numpy()

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            torch.compile(model, backend=backend)(torch.randn(4, 8)).sum().backward()
        assert all(kind in (Tensor, nn.Parameter) for kind in packed)
        return len(packed)

    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert count(aot_eager) == count(Backend()) > 0
    count("normfx")
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    count("normfx")


def test_capture_marks_nothing_in_an_ordinary_graph() -> None:
    backend = same(Stack().double(), x64(3, 8, grad=True))
    assert not any("normfx_carried" in node.meta for node in backend.graph.nodes)
