"""Residual streams run through checkpointed and nested regions: what is recomputed is the rewritten forward, folds are
not, and backward is left with as little as without normfx."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Block, keep_products, x64
from checkpoints import LIVE, NAMES, Layer, Partitioned, Stack, checkpointed, ids
from equivalence import EagerBackend, assert_same_float64, outputs_and_grads
from models import NO_SPECIAL, VISION, Call
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from normfx.backend import listening, transform
from normfx.ir import ops, recompute
from normfx.ir.inline import inline_regions
from normfx.ir.recompute import POLICY, REGION, region_of
from normfx.options import Options
from normfx.report import GraphReport

aten, higher = torch.ops.aten, torch.ops.higher_order

pytestmark = [  # raised inside torch, by custom autograd functions
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def graphs() -> Iterator[list[GraphReport]]:
    """Reports of the graphs compiled in the test."""
    found: list[GraphReport] = []
    with listening(found.append):
        yield found


class Traced(EagerBackend):
    """normfx's stages, then AOTAutograd: backward runs on what forward saved and computes the rest again."""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        super().__call__(gm, example_inputs)
        return aot_eager(self.modules[-1], example_inputs)

    def count(self, op: Any) -> int:
        return len(self.modules[-1].graph.find_nodes(op="call_function", target=op))


def same(compiled: Any, model: nn.Module, *inputs: Any, reference: Any = None) -> None:
    """Outputs and every gradient equal eager's, or the reference's, from the same random state."""
    expected, expected_grads = outputs_and_grads(model if reference is None else reference, model, inputs)
    actual, grads = outputs_and_grads(compiled, model, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-11, msg=name)


def traced(model: nn.Module, *inputs: Any) -> Traced:
    """The backend, after the model was compared with eager."""
    torch._dynamo.reset()
    backend = Traced(LIVE)
    same(torch.compile(model, backend=backend, fullgraph=True), model, *inputs)
    return backend


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, checkpointed(layer, x))


def inside(layer: nn.Module, x: Tensor) -> Tensor:
    """A checkpoint in a checkpoint, between other ops."""
    return checkpointed(lambda v: checkpointed(layer, v * 1.5) * 0.5, x)  # type: ignore[arg-type]


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, x, use_reentrant=True)


def selective(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(layer, x, context_fn=keep_products)


def wrapped(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = higher.wrap(layer, x)
    return out


def around_nested(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpointed(lambda v: nested(layer, v), x)  # type: ignore[arg-type]


@torch.compiler.nested_compile_region
def nested(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_norm_of_the_stream(p: float) -> None:
    """Norms in regions are found, named and converted."""
    report = assert_same_float64(Stack(p=p), (ids(),), {"fold": "live"})
    assert [(site.name, site.rules[0]) for site in report.sites] == [(name, "pre_rms_norm") for name in NAMES]


@pytest.mark.parametrize("call", [checkpointed, twice, inside, reentrant, nested, around_nested, wrapped])
def test_recomputed_forward(call: Any) -> None:
    """Backward recomputes the rewritten forward, with the random numbers that forward drew.

    Dynamo traces a nested region once, so that all its calls have the names of the first.
    """
    backend = traced(Stack(call, 0.5).double(), ids())
    sites = backend.report.sites
    assert len(sites) == (9 if call is twice else 5) and all(site.rules[0] == "pre_rms_norm" for site in sites)
    assert [site.name for site in sites] == NAMES or call in (twice, nested, around_nested)
    assert backend.count(ops.RMS_NORM) == len(sites) and not backend.count(higher.tag_activation_checkpoint)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_inductor(p: float, graphs: list[GraphReport]) -> None:
    """Random numbers are those that plain Inductor draws."""
    model = Stack(p=p).double()
    reference = torch.compile(model, backend="inductor", fullgraph=True) if p else None
    same(torch.compile(model, backend="normfx", options=LIVE, fullgraph=True), model, ids(), reference=reference)
    assert [(site.name, site.rules[0]) for site in graphs[0].sites] == [(name, "pre_rms_norm") for name in NAMES]


def test_nested_region_under_inductor(graphs: list[GraphReport]) -> None:
    model = Stack(nested).double()
    same(torch.compile(model, backend="normfx", options=LIVE, fullgraph=True), model, ids())
    assert [site.rules[0] for site in graphs[0].sites] == ["pre_rms_norm"] * 5


def _library(name: str) -> tuple[nn.Module, Any]:
    """A library's model that checkpoints its layers, in training; no dropout where a stream would lose its mean."""
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32, use_cache=False, **NO_SPECIAL)
        drops = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.1)
        return transformers.GPT2Model(transformers.GPT2Config(**sizes, **drops)), ids(2, 12)
    config = transformers.ViTConfig(**VISION, attention_probs_dropout_prob=0.1)
    return transformers.ViTModel(config, add_pooling_layer=False), torch.randn(2, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_library_models(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = _library(name)
    model.gradient_checkpointing_enable()
    call = Call(model, "last_hidden_state").train()
    report = assert_same_float64(call, (inputs,), {"fold": "live"})
    assert [site.rules[0] for site in report.sites] == ["pre_rms_norm"] * 5
    call.double()
    backend = traced(call, inputs.double() if inputs.is_floating_point() else inputs)
    graph = backend.modules[-1].graph
    assert len({region_of(n) for n in graph.nodes} - {None}) == 2


# ---------------------------------------------------------------- what backward is left with

ROWS = 640
"""Tokens: more than any feature dimension, and another number."""


@pytest.mark.parametrize(
    ("call", "partition"),
    [
        (checkpointed, min_cut_rematerialization_partition),
        (inside, min_cut_rematerialization_partition),
        (checkpointed, default_partition),
    ],
)
def test_memory(call: Any, partition: Any) -> None:
    """No activation more is kept than by torch alone; folds are kept, as many bytes as there are weights at most."""

    def run(call: Any, options: Any) -> Partitioned:
        return Partitioned(ROWS, options, partition).run(Stack(call, depth=3).double(), ids(1, ROWS))

    whole, plain, rewritten = run(Layer.__call__, {}), run(call, None), run(call, {})
    assert rewritten.saved_activations <= plain.saved_activations < whole.saved_activations / 3
    parameters = sum(8 * p.numel() for p in Stack(call, depth=3).parameters())
    assert rewritten.saved_weights - plain.saved_weights <= parameters
    assert rewritten.recomputed(aten.addmm.default) == plain.recomputed(aten.addmm.default) > 0
    assert not whole.recomputed(aten.addmm.default)


@pytest.mark.parametrize("partition", [min_cut_rematerialization_partition, default_partition])
def test_folds_are_not_recomputed(partition: Any) -> None:
    backend = Partitioned(ROWS, partition=partition).run(Stack().double(), ids(1, ROWS))
    assert backend.recomputed_from_parameters() == []


def _rewritten(model: nn.Module, *inputs: Any) -> GraphModule:
    torch._dynamo.reset()
    backend = EagerBackend(LIVE)
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return backend.modules[-1]


def test_marks() -> None:
    """Norms are recomputed with their region, folds are kept, what stands outside has no marks."""
    graph = _rewritten(Stack(), ids()).graph
    norms = [region_of(n) for n in graph.find_nodes(op="call_function", target=ops.RMS_NORM)]
    first = recompute.FIRST_REGION
    assert norms == [first, first, first + 1, first + 1, None]
    marks = [n.meta.get(POLICY) for n in graph.nodes if n.target in ops.FOLDS]
    assert set(marks) == {None, CheckpointPolicy.MUST_SAVE}
    assert not any(REGION in n.meta for n in graph.nodes if n.target in ops.FOLDS)


def test_centring_of_activations_is_recomputed() -> None:
    """A run-time centring is part of the region whose value it centres, unlike the centring of a weight."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
            self.writers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def layers(self, x: Tensor) -> Tensor:
            x = x.sin()
            for norm, writer in zip(self.norms, self.writers, strict=False):
                x = x + writer(norm(x).relu())
            return x

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[3](checkpoint(self.layers, x, use_reentrant=False))

    backend = traced(Model().double(), x64(5, 8))
    graph = backend.modules[-1].graph
    centred = [n for n in graph.find_nodes(op="call_function", target=ops.CENTER) if n.args[0].op == "call_function"]
    assert [region_of(n) for n in centred] == [recompute.FIRST_REGION]
    assert backend.count(ops.RMS_NORM) == 4


def test_without_gradients_there_is_nothing_to_recompute() -> None:
    with torch.no_grad():
        graph = _rewritten(Stack(), ids()).graph
    assert len(graph.find_nodes(op="call_function", target=ops.RMS_NORM)) == 5
    assert not any(POLICY in n.meta or REGION in n.meta for n in graph.nodes)

    class Model(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(ids)

    graph = _rewritten(Model(), ids()).graph
    assert not any(REGION in n.meta for n in graph.nodes)


def test_caches_know_the_marks() -> None:
    """The same nodes with and without a checkpoint are two graphs to AOTAutograd's cache."""
    digests = [recompute.digest(_rewritten(Stack(call), ids()).graph) for call in (checkpointed, Layer.__call__)]
    assert digests[0] and not digests[1]


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
            return call(self.inner, x)  # type: ignore[no-any-return]

    model = Model().double()
    backend = traced(model, x64(3, 8, grad=True))
    whole = higher.autograd_function_apply if call is Layer.__call__ else higher.tag_activation_checkpoint
    assert backend.count(whole) == 1
    gm = _dynamo_graph(model, x64(3, 8))
    assert inline_regions(gm) is gm
    with torch.no_grad():  # nothing is saved, so nothing is lost
        assert (inline_regions(gm) is gm) == (call is Layer.__call__)


class Neighbours(nn.Module):
    """A plain checkpoint before and behind a selective one."""

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
    assert refused == [[], ["observed"], [], [], []]


def test_memory_beside_selective_checkpoints() -> None:
    """What one checkpoint hands to the next is kept, whoever numbers them; and the mean of each row that is centred in
    front of a checkpoint: of two values here."""
    plain, rewritten = (Partitioned(ROWS, options).run(Neighbours().double(), ids(1, ROWS)) for options in (None, {}))
    assert rewritten.saved_activations <= plain.saved_activations + 2 * 8 * ROWS


class Inside(nn.Module):
    """A module, checkpointed, and a norm behind it."""

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
            return y.sin()  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return self.block(checkpoint(self.body, x, use_reentrant=False))  # type: ignore[no-any-return]

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
            return self.block(x) * mask  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]

    backend = traced(Model().double(), x64(3, 8, grad=True))
    assert not backend.count(higher.tag_activation_checkpoint)


def test_dynamic_rows() -> None:
    model, backend = Stack(inside).double(), Traced(LIVE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 11):
        same(compiled, model, ids(2, tokens))
    assert len(backend.graphs) <= 2 and backend.count(ops.RMS_NORM) == 5
