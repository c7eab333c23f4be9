"""What the tests of capture share: a backend that captures, small models, runs with gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from normfx.capture.trace import Captured, capture
from normfx.checks.verify import verify

aten = torch.ops.aten


class Backend:
    """Compiles the canonical graph and remembers it."""

    def __init__(self, lower: Callable[..., Any] = aot_eager) -> None:
        self.lower = lower
        self.seen: list[Captured] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        state = torch.get_rng_state()
        before = [(x, x._version, x.clone()) for x in example_inputs if _real(x)]
        code = _code(gm)
        captured = capture(gm, example_inputs)
        assert torch.equal(state, torch.get_rng_state())
        assert all(x._version == version and torch.equal(x, value) for x, version, value in before)
        assert _code(gm) == code
        _check(gm, captured)
        self.seen.append(captured)
        return self.lower(captured.graph_module, example_inputs)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.seen[-1].graph_module.graph

    def count(self, op: Any) -> int:
        return len(self.graph.find_nodes(op="call_function", target=op))


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor) and not x.is_inference()


def _code(gm: torch.fx.GraphModule) -> list[str]:
    """The code of Dynamo's graph and of the bodies that it carries, which others may compile after normfx."""
    return [module.graph.python_code("self").src for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]


def _check(gm: torch.fx.GraphModule, captured: Captured) -> None:
    canonical = captured.graph_module
    verify(canonical, "capture")
    if all("example_value" in node.args[0].meta for node in gm.graph.find_nodes(op="call_method")):
        for node in canonical.graph.find_nodes(op="call_method"):
            assert "example_value" in node.args[0].meta, f"AOTAutograd would not cache {node}"
    old, new = gm.graph.find_nodes(op="placeholder"), canonical.graph.find_nodes(op="placeholder")
    assert [n.name for n in old] == [n.name for n in new]
    assert all(n in captured.sources for n in new)
    parameters = [isinstance(n.meta["example_value"], nn.Parameter) for n in old]
    assert parameters == [captured.sources[n].kind == "parameter" for n in new]


def run(f: Callable[..., Any], model: nn.Module | None, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Any]]:
    """Outputs, mutated arguments, and gradients of parameters and arguments, of one seeded call."""
    torch.manual_seed(1)
    args = pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args)
    leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    leaves += list(model.parameters()) if model is not None else []
    wants_grad = [t.requires_grad for t in leaves]  # an in-place op may turn an argument into one that does
    out = f(*args, **kwargs)
    outs = [o for o in pytree.tree_leaves(out) if isinstance(o, Tensor)]
    wanted = [t for t, wants in zip(leaves, wants_grad, strict=True) if wants]
    sources = [o for o in outs if o.requires_grad]
    grads: list[Any] = []
    if sources and wanted:
        loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in sources)
        grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
    state = list(model.buffers()) if model is not None else []
    return [t.detach() for t in [*outs, *leaves, *state]], [torch.randn(3), *grads]


def same(model: Any, *args: Any, backend: Backend | None = None, dynamic: bool | None = None, **kwargs: Any) -> Backend:
    """Asserts that the compiled model equals eager in outputs, mutations, gradients and random numbers
    drawn.
    """
    backend = backend or Backend()
    twin = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    module, twin_module = (m if isinstance(m, nn.Module) else None for m in (model, twin))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    got, got_grads = run(compiled, module, *args, **kwargs)
    want, want_grads = run(twin, twin_module, *args, **kwargs)
    assert len(got) == len(want) and len(got_grads) == len(want_grads)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert backend.seen
    return backend


def x64(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


keep_products = functools.partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default])
"""`context_fn` of a selective checkpoint."""


class Block(nn.Module):
    def __init__(self, d: int = 8, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, layers: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(p=p) for _ in range(layers))
        self.norm_f = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return self.norm_f(x)


class DoubleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grad * w, 3 * (grad * x).sum(0)


class Custom(nn.Module):
    def __init__(self, no_grad: bool = False) -> None:
        super().__init__()
        self.w, self.norm, self.no_grad = nn.Parameter(torch.randn(8)), nn.LayerNorm(8), no_grad

    def forward(self, x: Tensor) -> Tensor:
        y = DoubleGradient.apply(self.norm(x), self.w)
        if self.no_grad:
            with torch.no_grad():
                y = y + DoubleGradient.apply(x, self.w)
        return y + 1


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
