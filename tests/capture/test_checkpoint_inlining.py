"""Which regions of Dynamo's graph are written out, which stay whole, and that the graph itself is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Block, x64
from checkpoints import (
    LIVE,
    RMS_NORMS,
    ROWS,
    Layer,
    Partitioned,
    Stack,
    Traced,
    checkpointed,
    ids,
    inside,
    nested,
    same,
    selective,
    traced,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from normfx.backend import transform
from normfx.capture.inline import inline_regions
from normfx.graph import recompute
from normfx.graph.recompute import POLICY, region_of
from normfx.options import Options

aten, higher = torch.ops.aten, torch.ops.higher_order


# ---------------------------------------------------------------- what stays whole


class Reversible(torch.autograd.Function):
    """y₁ = x₁ + tanh(x₂ A), y₂ = x₂ + tanh(y₁ B): backward computes x from y, by hand."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + torch.tanh(x2 @ a)
        y2 = x2 + torch.tanh(y1 @ b)
        ctx.save_for_backward(y1, y2, a, b)
        return y1, y2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, ...]:
        y1, y2, a, b = ctx.saved_tensors
        g = torch.tanh(y1 @ b)
        x2 = y2 - g
        dg = d2 * (1 - g * g)
        d1 = d1 + dg @ b.T
        f = torch.tanh(x2 @ a)
        df = d1 * (1 - f * f)
        return d1, d2 + df @ a.T, x2.T @ df, y1.T @ dg


class ReversibleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(Reversible.apply(*self.up(x).chunk(2, -1), self.a, self.b), -1)
        return self.norm(x + self.down(x.sin()))


@pytest.mark.parametrize("call", [Layer.__call__, checkpointed])
def test_reversible_blocks_stay_whole(call: Any) -> None:
    """So does a checkpoint around one: what it saves would lose the marks."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ReversibleBlock()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = call(self.inner, x)
            return out

    model = Model().double()
    backend = traced(model, x64(3, 8, grad=True))
    whole = higher.autograd_function_apply if call is Layer.__call__ else higher.tag_activation_checkpoint
    assert backend.count(whole) == 1
    gm = _dynamo_graph(model, x64(3, 8))
    assert inline_regions(gm) is gm
    with torch.no_grad():  # nothing is saved, so nothing is lost
        assert (inline_regions(gm) is gm) == (call is Layer.__call__)


class Neighbours(nn.Module):
    """A plain checkpoint before and after a selective one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(20, 8), nn.ModuleList(Layer(8, 0.5) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer, call in zip(self.layers, (checkpointed, selective, checkpointed), strict=True):
            x = call(layer, x)
        return self.norm(x)


def test_selective_checkpoints_stay_whole() -> None:
    """They observe the stream, and the report says so."""
    backend = traced(Neighbours().double(), ids())
    (whole,) = backend.modules[-1].graph.find_nodes(op="call_function", target=higher.tag_activation_checkpoint)
    read = [n for n in whole.all_input_nodes if n.op == "call_function"]
    assert [n.meta.get(POLICY) for n in read] == [CheckpointPolicy.MUST_SAVE]
    sites = backend.report.sites
    assert [site.name for site in sites] == [f"layers.{i}.norm{k}" for i in (0, 2) for k in (1, 2)] + ["norm"]
    refused = [[r.code for r in site.refusals if r.rule == "pre_rms_norm"] for site in sites]
    assert refused == [["uncentred_input"], ["observed"], [], [], []]


@pytest.mark.slow
def test_memory_beside_selective_checkpoints() -> None:
    """What one checkpoint hands to the next is kept, whichever code numbers them; and, of two values here, the mean of
    each row that is centred in front of a checkpoint."""
    plain, rewritten = (Partitioned(ROWS, options).run(Neighbours().double(), ids(1, ROWS)) for options in (None, {}))
    assert rewritten.saved_activations <= plain.saved_activations + 2 * 8 * ROWS


class Inside(nn.Module):
    """A module, checkpointed, and a norm after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.write, self.norm = inner, nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.write(checkpointed(self.inner, x)))


def test_a_nested_region_without_a_norm_stays_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.tail = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return nested(self.tail, nested(self.tail, self.block(x)))

    backend = traced(Model().double(), x64(3, 8, grad=True))
    assert backend.count(higher.invoke_subgraph) == 2
    backend = traced(Inside(Model()).double(), x64(3, 8, grad=True))
    assert backend.count(higher.invoke_subgraph) == 2 and not backend.count(higher.tag_activation_checkpoint)
    regions = [region_of(n) for n in backend.modules[-1].graph.nodes if n.target is higher.invoke_subgraph]
    assert regions == [recompute.FIRST_REGION] * 2


# ---------------------------------------------------------------- the copy


def _dynamo_graph(f: Callable[..., Any], *args: Any) -> GraphModule:
    seen: list[GraphModule] = []

    def backend(gm: GraphModule, _: Any) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True)(*args)
    return seen[0]


def _text(gm: GraphModule) -> list[Any]:
    inner = [m for m in gm.modules() if isinstance(m, GraphModule)]
    return [(n.op, n.name, str(n.target), str(n.args), POLICY in n.meta) for m in inner for n in m.graph.nodes]


@pytest.mark.parametrize("call", [checkpointed, inside, nested])
def test_the_original_is_untouched(call: Any) -> None:
    gm = _dynamo_graph(Stack(call), ids())
    before = _text(gm)
    inlined = inline_regions(gm)
    assert _text(gm) == before and inlined is not gm
    assert inline_regions(inlined) is inlined
    names = [n.name for n in inlined.graph.nodes]
    assert len(names) == len(set(names))


def test_an_unchanged_graph_is_compiled_as_it_came() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpointed(self.inner, x)

    seen: list[bool] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(transform(gm, inputs, Options.parse(LIVE, environ={})).graph_module is gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Model(), backend=backend, fullgraph=True)(torch.randn(3, 8))
    assert seen == [True]


def test_attributes_of_bodies() -> None:
    """Constants inside a region find a place on the graph around it, each once, under names of their own."""
    table = torch.arange(8.0, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        def body(v: Tensor, k: int) -> Tensor:
            other = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(4)
            return F.layer_norm(v, (8,)) * table + other * k

        x = checkpoint(body, x, 1, use_reentrant=False)
        return F.layer_norm(checkpoint(body, x, 3, use_reentrant=False), (8,)) + table

    x = x64(3, 8)
    torch._dynamo.reset()
    backend = Traced({"strict": True, "fold": "live"})
    got = torch.compile(f, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, f(x), rtol=0, atol=1e-12)


def test_what_cannot_be_traced_stays_whole() -> None:
    """A hook on a value inside."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def body(self, x: Tensor) -> Tensor:
            y = self.block(x)
            y.register_hook(lambda grad: grad * 2)
            out: Tensor = y.sin()
            return out

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(checkpoint(self.body, x, use_reentrant=False))
            return out

    traced(Model().double(), x64(3, 8, grad=True))


def test_modes_inside_regions() -> None:
    """A region that switches modes, and a checkpoint inside no_grad inside a checkpoint."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other = Block(), Block()

        def body(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                mask = checkpointed(self.other, x).sigmoid()
            out: Tensor = self.block(x) * mask
            return out

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.body, x, use_reentrant=False)
            return out

    backend = traced(Model().double(), x64(3, 8, grad=True))
    assert not backend.count(higher.tag_activation_checkpoint)


@pytest.mark.slow
def test_dynamic_rows() -> None:
    model, backend = Stack(inside).double(), Traced(LIVE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 11):
        same(compiled, model, ids(2, tokens))
    assert len(backend.graphs) <= 2 and backend.count(*RMS_NORMS) == 5
