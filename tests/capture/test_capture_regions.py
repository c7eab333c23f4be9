"""capture: nodes that carry subgraphs, and grad, autocast and inference modes, stay as they are and mean the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Backend, Block, Custom, Stack, keep_products, same, x64
from raising import raises_inside
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfx.errors import NormfxError

aten = torch.ops.aten


# ---------------------------------------------------------------- carried nodes


def test_checkpoint_with_dropout() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(p=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.block(x), use_reentrant=False) * 2

    backend = same(Model().double(), x64(3, 8, grad=True))
    assert backend.count(torch.ops.higher_order.tag_activation_checkpoint) == 0
    assert backend.count(aten.layer_norm.default) == 2


def test_selective_checkpoint() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(p=0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.block, x, use_reentrant=False, context_fn=keep_products)
            return checkpoint(self.block, x, use_reentrant=False) * 2

    backend = same(Model().double(), x64(3, 8, grad=True))
    assert backend.count(torch.ops.higher_order.tag_activation_checkpoint) == 1
    assert backend.count(aten.layer_norm.default) == 1


@pytest.mark.parametrize("inner_no_grad", [False, True])
def test_custom_function_keeps_its_gradient(inner_no_grad: bool) -> None:
    same(Custom(inner_no_grad).double(), x64(3, 8, grad=True))


def test_custom_function_under_no_grad() -> None:
    with torch.no_grad():
        same(Custom().double(), x64(3, 8))


def test_cond() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.block(v), lambda v: v * 2, (x,)) + 1

    model = Model().double()
    for sign in (1, -1):
        same(model, sign * x64(3, 8).abs(), backend=Backend())


def test_while() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    def f(n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n, x = while_loop(lambda n, x: n > 0, lambda n, x: (n - 1, F.layer_norm(x, (8,)) * 2), (n, x))
        return n, x + 1

    with torch.no_grad():
        same(f, torch.tensor(3), x64(2, 8))


def test_nested_compile_region() -> None:
    block = Block().double()

    @torch.compiler.nested_compile_region
    def inner(v: Tensor) -> Tensor:
        return block(v)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return inner(inner(x)) + 1

    backend = Backend()
    model, x = Model(), x64(3, 8, grad=True)
    got = torch.compile(model, backend=backend, fullgraph=True)(x)
    want = model(x)
    parameters = [x, *model.parameters()]
    pairs = zip(*(torch.autograd.grad(out.sum(), parameters) for out in (got, want)), strict=True)
    for a, b in [(got, want), *pairs]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert backend.count(torch.ops.higher_order.invoke_subgraph) == 0
    assert backend.count(aten.layer_norm.default) == 2


def test_functorch_regions() -> None:
    w = x64(8, 8)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(x, (8,))
        y = torch.func.vmap(lambda row: w @ row)(x)
        g = torch.func.grad(lambda v: F.layer_norm(v, (8,)).pow(3).sum())(x)
        return F.layer_norm(y, (8,)), g + 1

    backend = same(f, x64(3, 8))
    assert backend.count(aten.layer_norm.default) == 2


def test_jvp() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda v: F.layer_norm(v, (8,)).sin(), (x,), (x * 2,))[1] + F.layer_norm(x, (8,))

    assert same(f, x64(3, 8)).count(aten.layer_norm.default) == 1


def test_tensor_hook_is_a_barrier() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y.register_hook(lambda grad: grad * 2)
            return self.up(y)

    same(Model().double(), x64(3, 8, grad=True))


def test_autograd_inside_the_graph_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.autograd.grad(F.layer_norm(x, (8,)).pow(2).sum(), x)[0]

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("Dynamo of this torch never traces torch.autograd.grad")
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        raises_inside(NormfxError, r"'grad' at test_capture_regions\.py:.* cannot be traced"),
    ):
        torch.compile(f, backend=Backend(), fullgraph=True)(x64(3, 8, grad=True))


# ---------------------------------------------------------------- modes


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        with torch.no_grad():
            z = self.b(self.norm(x))
        return self.norm(y.to(x.dtype)) + z + self.b(x)


def test_inner_modes() -> None:
    backend = same(Modes(), torch.randn(3, 8, requires_grad=True))
    linears = backend.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [n.meta["val"].dtype for n in linears] == [torch.bfloat16, torch.float32, torch.float32]
    names = [n.target.__name__ for n in backend.graph.nodes if n.op == "call_function"]
    assert names.count("_enter_autocast") == names.count("_exit_autocast") == 1
    assert names.count("_set_grad_enabled") == 2


def test_ambient_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        backend = same(Block(), torch.randn(3, 8, requires_grad=True))
    linear = backend.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    assert linear.meta["val"].dtype == torch.bfloat16
    assert not any("autocast" in str(n.target) for n in backend.graph.nodes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ambient_grad_mode(mode: Any) -> None:
    model, x = Stack().double(), x64(3, 8)
    with mode():
        backend = Backend()
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=0, atol=1e-13)
    assert not any(n.meta["val"].requires_grad for n in backend.graph.find_nodes(
        op="call_function", target=aten.linear.default))  # fmt: skip


def test_inner_inference_mode() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = F.layer_norm(x, (8,))
        return F.layer_norm(x, (8,)) + y.sum()

    backend = Backend()
    x = x64(3, 8)
    got = torch.compile(f, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, f(x))
    names = [n.target.__name__ for n in backend.graph.nodes if n.op == "call_function"]
    assert "_enter_inference_mode" in names and "_exit_inference_mode" in names
