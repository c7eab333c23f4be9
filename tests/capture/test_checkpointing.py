"""Residual streams run through checkpointed and nested regions: what is recomputed is the rewritten forward, folds are
not, and backward is left with as little as without normfx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from capturing import x64
from checkpoints import (
    LIVE,
    NAMES,
    RMS_NORMS,
    ROWS,
    Layer,
    Partitioned,
    Stack,
    around_nested,
    checkpointed,
    ids,
    inside,
    nested,
    reentrant,
    same,
    traced,
    twice,
    wrapped,
)
from equivalence import EagerBackend, assert_same_float64
from models import NO_SPECIAL, VISION, Call
from torch import Tensor, nn
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from normfx.backend import listening
from normfx.graph import recompute
from normfx.graph.recompute import POLICY, REGION, region_of
from normfx.ir import ops
from normfx.report import GraphReport

aten, higher = torch.ops.aten, torch.ops.higher_order


@pytest.fixture
def graphs() -> Iterator[list[GraphReport]]:
    """Reports of the graphs compiled in the test."""
    found: list[GraphReport] = []
    with listening(found.append):
        yield found


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
    assert backend.count(*RMS_NORMS) == len(sites) and not backend.count(higher.tag_activation_checkpoint)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["gpt2", pytest.param("vit", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    ("call", "partition"),
    [
        (checkpointed, min_cut_rematerialization_partition),
        pytest.param(inside, min_cut_rematerialization_partition, marks=pytest.mark.slow),
        pytest.param(checkpointed, default_partition, marks=pytest.mark.slow),
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
    norms = [region_of(n) for n in graph.nodes if n.target in RMS_NORMS]
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
    assert backend.count(*RMS_NORMS) == 4


def test_without_gradients_there_is_nothing_to_recompute() -> None:
    with torch.no_grad():
        graph = _rewritten(Stack(), ids()).graph
    assert sum(n.target in RMS_NORMS for n in graph.nodes) == 5
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
