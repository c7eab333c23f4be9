"""Weights, inputs and streams that are tensor subclasses: DTensor, jagged tensors, a quantised weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from capturing import Backend, Model, Stack, x64
from equivalence import EagerBackend
from torch import Tensor, nn

aten = torch.ops.aten

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Packed(Tensor):
    """int8 codes and a scale for each row, multiplied out where they are used."""

    codes: Tensor
    scale: Tensor

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """AOTAutograd of torch 2.11 prints it, also on fakes, whose entries nothing can print."""
        return f"Packed({tuple(self.shape)})"

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


def _check(model: nn.Module, *inputs: Tensor, norms: int = 1, kept: int | None = None) -> None:
    """Outputs and gradients, with live folds; outputs with cached and, by Inductor, frozen ones.

    norms, kept: how many become RMSNorms, with live and with cached folds (as many, where it is not given)
    """
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
        assert backend.report.counts["to_rms_norm"] == (kept if options and kept is not None else norms)
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
    _check(model, x64(4, 8), kept=0)  # DTensors are folded in each call, which for so few rows does not pay


def test_nested_input() -> None:
    """A jagged input, with a stream of its own next to a plain one."""
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


def test_methods_of_a_subclass_can_be_cached() -> None:
    """AOTAutograd's cache asks whether a method is one of a tensor's, of inputs and of what was computed."""
    backend = Backend()
    weight = Packed(torch.randint(-9, 9, (8, 8), dtype=torch.int8), torch.rand(8, 1, dtype=torch.float64))
    x = x64(4, 8)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.clone().detach()

    torch.testing.assert_close(torch.compile(call, backend=backend, fullgraph=True)(x, weight), call(x, weight))
    methods = backend.graph.find_nodes(op="call_method")
    assert len(methods) == 2 and all("example_value" in node.args[0].meta for node in methods)


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
