"""1 + tanh u as 2 σ(2u): the same number in double precision, only in inference, only where nothing else reads tanh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import Marks
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu

from normfx.lower.passes import HOOK
from normfx.lower.sigmoid import SigmoidForTanh, with_sigmoids

C = math.sqrt(2 / math.pi)

GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: gelu(x, approximate="tanh"),
    "power": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "tanh first": lambda x: 0.5 * x * (torch.tanh(C * (x + 0.044715 * x**3)) + 1),
}

STAY: dict[str, Callable[[Tensor], Any]] = {
    "another reader": lambda x: ((y := torch.tanh(x)) + 1, y * 3),
    "another number": lambda x: torch.tanh(x) + 2,
    "alpha": lambda x: torch.add(torch.tanh(x), 1, alpha=2),
    "a tensor": lambda x: torch.tanh(x) + torch.ones(()),
    "minus": lambda x: 1 - torch.tanh(x),
    "returned": lambda x: (y := torch.tanh(x), y + 1),
}


def passed(body: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Return a graph of ATen ops, changed by the pass."""
    table = torch._decomp.get_decompositions([torch.ops.aten.gelu])
    gm = make_fx(body, tracing_mode="fake", decomposition_table=table)(*inputs)
    SigmoidForTanh()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def count(gm: GraphModule, name: str) -> int:
    return sum(str(node.target).startswith(f"aten.{name}") for node in gm.graph.nodes)


VALUES = [0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 0.7, -0.7, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 1e4, -1e4, math.inf]


@pytest.mark.parametrize("name", GELUS)
def test_the_same_in_double(name: str) -> None:
    x = torch.tensor(VALUES, dtype=torch.float64)
    gm = passed(GELUS[name], x)
    assert (count(gm, "tanh"), count(gm, "sigmoid")) == (0, 1)
    torch.testing.assert_close(gm(x), GELUS[name](x), rtol=1e-14, atol=1e-14)
    assert gm(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GELUS)
def test_no_less_exact(name: str, dtype: torch.dtype) -> None:
    """Compares the error against double precision with that of Inductor's own code."""
    x = torch.linspace(-8, 8, 4001).to(dtype)
    exact = GELUS[name](x.double())
    errors = []
    for backend in ("inductor", "normfx"):
        torch._dynamo.reset()
        call = torch.compile(GELUS[name], backend=backend)
        with torch.no_grad():
            errors.append(((call(x).double() - exact).norm() / exact.norm()).item())
    assert errors[1] <= 1.25 * errors[0] + 1e-8


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    x = torch.randn(5)
    gm = passed(STAY[name], x)
    assert (count(gm, "tanh"), count(gm, "sigmoid")) == (1, 0)
    torch.testing.assert_close(gm(x), STAY[name](x))


def test_integers_stay() -> None:
    assert count(passed(lambda x: torch.tanh(x) + 1, torch.arange(4)), "sigmoid") == 0


def test_training_keeps_its_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 8)).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, backend="normfx", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        x.grad = None
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_a_pass_of_the_users_runs_first() -> None:
    marks = Marks()
    patches = with_sigmoids({HOOK: marks, "epilogue_fusion": True})
    gm = make_fx(lambda x, y: torch.mm(x, y).tanh() + 1, tracing_mode="fake")(torch.randn(3, 3), torch.randn(3, 3))
    patches[HOOK](gm.graph)
    assert marks.seen == 1 and count(gm, "tanh") == 0 and patches["epilogue_fusion"] is True
    assert "marks" in patches[HOOK].uuid()
    assert with_sigmoids({HOOK: Marks(None)})[HOOK].uuid() is None  # it may not be cached
    assert with_sigmoids({})[HOOK].uuid() == with_sigmoids({})[HOOK].uuid() is not None
