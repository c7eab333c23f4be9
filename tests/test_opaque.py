"""What capture must not look into: opaque functions, operators from outside torch, tensor subclasses.

Answers and gradients are the same, and nothing of the user's runs more often than with AOTAutograd alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._pytree as pytree
from capturing import Backend, Stack, same, x64
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from normfx.ir.opaque import calls_unknown

aten = torch.ops.aten

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

WRAPPERS = [
    torch.compiler.allow_in_graph,
    getattr(torch.compiler, "nonstrict_trace", None) or torch._dynamo.nonstrict_trace,
]


class Model(nn.Module):
    """A norm that converts, and what is put between its readers. The parameters have means."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.middle = middle
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.norm(self.first(x)) * 3))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


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


# ---------------------------------------------------------------- operators, hooks


CALLS = {"fake": 0, "setup": 0, "backward": 0, "written": 0}


@torch.library.custom_op("normfx_tests::twice", mutates_args=())
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


@torch.library.custom_op("normfx_tests::double_", mutates_args=("x",))
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

    from normfx.capture import capture

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


# ---------------------------------------------------------------- subclasses


class Packed(Tensor):
    """int8 codes and a scale for each row, multiplied out where they are used."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Packed:
        made: Packed = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Packed:
        return Packed(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default):
            return Packed(func(args[0].codes), func(args[0].scale))
        args, kwargs = pytree.tree_map_only(cls, lambda p: p.codes.to(p.scale.dtype) * p.scale, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


def _packed_model() -> Model:
    model = Model().double()
    codes = torch.randint(-9, 9, (8, 8), dtype=torch.int8)
    model.last.weight = nn.Parameter(Packed(codes, torch.rand(8, 1, dtype=torch.float64)), requires_grad=False)
    return model


def _gradients(call: Any, model: nn.Module, *inputs: Tensor) -> list[Any]:
    model.zero_grad()
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    out = call(*inputs)
    (out.values() if out.is_nested else out).pow(3).sum().backward()
    found = [out.detach(), *(x.grad for x in inputs), *(p.grad for p in model.parameters())]
    return [_local(x) for x in found]


def _local(x: Any) -> Any:
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.values() if x is not None and x.is_nested else x


def _agree(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def _check(model: nn.Module, *inputs: Tensor, norms: int = 1) -> None:
    """Outputs and gradients, with live folds; outputs with cached and, by Inductor, frozen ones."""
    want = _gradients(model, model, *inputs)
    for options in ({}, {"fold": "cached"}):
        torch._dynamo.reset()
        backend = EagerBackend(options)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        if options:
            with torch.no_grad():
                _agree([_local(compiled(*inputs))], want[:1])
        else:
            _agree(_gradients(compiled, model, *inputs), want)
        assert backend.report.counts["to_rms_norm"] == norms
    torch._dynamo.reset()
    with torch.no_grad():
        frozen = torch.compile(model, backend="normfx", options={"fold": "frozen", "strict": True})
        _agree([_local(frozen(*inputs))], want[:1])


def test_weight_of_a_subclass() -> None:
    _check(_packed_model(), x64(4, 8))


def test_writer_of_a_subclass_is_not_centred() -> None:
    model = _packed_model()
    model.first.weight, model.last.weight = model.last.weight, model.first.weight
    _check(model, x64(4, 8), norms=0)


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_tensor_parallel_layers(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.write, self.norm, self.up, self.down = (
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 16),
                nn.Linear(16, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(self.norm(self.write(x)))))

    model = Block().double()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    _check(model, x64(4, 8))


def test_distributed_stream(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    class Outer(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(DTensor.from_local(x, mesh, [Replicate()], run_check=False))
            return y.redistribute(mesh, [Replicate()]).to_local()

    model = Outer().double()
    distribute_module(model, mesh)
    _check(model, x64(4, 8), norms=0)


def test_nested_input() -> None:
    """A jagged input, with a stream of its own beside a plain one."""
    model = nn.ModuleDict({"plain": Model(), "jagged": Model()}).double()
    x, lengths = x64(4, 8), torch.tensor([0, 1, 4])

    def call(x: Tensor, nested: Tensor) -> Tensor:
        return model["plain"](x) * model["jagged"](nested).values()

    nested = torch.nested.nested_tensor_from_jagged(x64(4, 8), lengths)
    want = call(x, nested)
    backend = EagerBackend()
    torch._dynamo.reset()
    got = torch.compile(call, backend=backend, fullgraph=True)(x, nested)
    assert backend.report.counts["to_rms_norm"] == 1
    grads = [torch.autograd.grad(out.pow(3).sum(), list(model.parameters())) for out in (got, want)]
    _agree([got, *grads[0]], [want, *grads[1]])


def test_inputs_and_outputs_of_a_subclass() -> None:
    model = Model().double()
    nested = torch.nested.nested_tensor_from_jagged(x64(4, 8), torch.tensor([0, 1, 4]))
    want = model(nested)
    torch._dynamo.reset()
    backend = EagerBackend({"fold": "live"})
    got = torch.compile(model, backend=backend, fullgraph=True)(nested)
    _agree([got.values()], [want.values()])


def test_compiled_autograd() -> None:
    """Its backward graph takes a list, and real scalars."""
    model, x = Stack().double(), x64(4, 8)
    model(x).mean().backward()
    want = [p.grad for p in model.parameters()]
    for dynamic in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        backend = Backend()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, dynamic=dynamic)):
            model(x).mean().backward()
        assert backend.seen
        _agree([p.grad for p in model.parameters()], want)


def test_capture_marks_nothing_in_an_ordinary_graph() -> None:
    backend = same(Stack().double(), x64(3, 8, grad=True))
    assert not any("normfx_carried" in node.meta for node in backend.graph.nodes)
