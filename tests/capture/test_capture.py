"""capture: the canonical graph computes what the model computes, keeps its gradients, and hides nothing from
Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Backend, Block, Custom, Stack, same, x64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfx.capture.trace import capture, capture_exported
from normfx.checks.verify import verify
from normfx.graph.names import dotted, module_path, source_line

aten = torch.ops.aten


# ---------------------------------------------------------------- what stays whole


def test_ops_stay_whole_and_spellings_collapse() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
            self.w, self.g = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.table(ids))
            x = F.rms_norm(x @ self.w, (8,), self.g, 1e-6)
            x = torch.matmul(x, self.w).add(1.0) + 1.0
            return F.scaled_dot_product_attention(x, x, x)

    backend = same(Model().double(), torch.randint(10, (2, 5)))
    for op in (aten.layer_norm.default, aten.embedding.default, aten.rms_norm.default):
        assert backend.count(op) == 1
    assert backend.count(aten.scaled_dot_product_attention.default) == 1
    assert backend.count(aten.matmul.default) == 2 and backend.count(aten.add.Tensor) == 2


def test_sources_modules_and_lines() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(8), nn.ModuleDict({"a": nn.Linear(8, 8)})["a"])
            self.register_buffer("scale", torch.ones(8))
            self.shift = torch.ones(8)

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            y = self.body(x) * self.scale + self.shift
            return y + more["bias"] + torch.tensor([1.0] * 8) + torch.tensor(0.5)

    backend = same(Model().double(), x64(2, 8), {"bias": x64(8)})
    sources = {s.name: s.kind for s in backend.seen[0].sources.values()}
    assert sources == {
        "body.0.weight": "parameter",
        "body.0.bias": "parameter",
        "body.1.weight": "parameter",
        "body.1.bias": "parameter",
        "scale": "buffer",
        "shift": "input",
        "x": "input",
        "more.bias": "input",
        "_tensor_constant0": "constant",
    }
    norm = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)[0]
    assert module_path(norm) == "body.0"
    assert source_line(norm).startswith("test_capture.py:")
    assert source_line(norm).endswith("in forward: y = self.body(x) * self.scale + self.shift")


@pytest.mark.parametrize(
    ("expression", "path"),
    [
        ("L['self']._modules['h']._modules['0']._parameters['weight']", "h.0.weight"),
        ("L['self'].transformer.h[0].ln_1", "transformer.h.0.ln_1"),
        ("L['self']._orig_mod._modules['0']", "0"),
        ("L['batch']['ids']", "batch.ids"),
        ("L['x'].size()[1]", "x.size.1"),
        ("G['model']._buffers['mask']", "model.mask"),
        ("", ""),
    ],
)
def test_dotted(expression: str, path: str) -> None:
    assert dotted(expression) == path


# ---------------------------------------------------------------- transformers


def gpt2(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=30,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_gpt2(attention: str, training: bool) -> None:
    model = gpt2(attention).train(training)
    backend = same(model, torch.randint(30, (2, 7)))
    assert backend.count(aten.layer_norm.default) == 5
    norms = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert [module_path(n) for n in norms][:2] == ["transformer.h.0.ln_1", "transformer.h.0.ln_2"]
    assert source_line(norms[0]).startswith("modeling_gpt2.py:")
    assert "transformer.h.0.ln_1.weight" in {s.name for s in backend.seen[0].sources.values()}


@pytest.mark.slow
def test_gpt2_generate_with_cache() -> None:
    model = gpt2("sdpa").eval()
    ids = torch.randint(1, 30, (1, 4))
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, **options)
    backend = Backend()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)
    assert backend.seen and backend.count(aten.layer_norm.default) == 5


# ---------------------------------------------------------------- mutation, constants


def test_in_place_residual() -> None:
    class Model(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.norm(x))
            y += self.up(x)
            y.add_(2)
            return y

    same(Model().double(), x64(3, 8, grad=True))


def test_input_mutation_and_its_fake() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            x.add_(self.w)  # makes x require grad: AOTAutograd must not see that on its own fake
            cache[:, 1] = x[:, 1].detach()
            return F.layer_norm(x, (8,))

    same(Model().double(), x64(3, 8), x64(3, 8))


def test_aliased_inputs() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return F.layer_norm(x, (8,)) * 2

    base = x64(3, 8)
    mine, eager = base.clone(), base.clone()
    got = torch.compile(f, backend=Backend(), fullgraph=True)(mine, mine[1:])
    torch.testing.assert_close(got, f(eager, eager[1:]))
    torch.testing.assert_close(mine, eager)


def test_batch_norm_updates_its_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).double()
    backend = same(model, x64(2, 3, 6, 6))
    kinds = {s.name: s.kind for s in backend.seen[0].sources.values()}
    assert kinds["1.running_mean"] == kinds["1.running_var"] == kinds["1.num_batches_tracked"] == "buffer"


def test_dead_code() -> None:
    def f(x: Tensor) -> Tensor:
        F.layer_norm(x, (8,))
        F.dropout(x, 0.5)
        torch.rand(3)
        return x + 1

    backend = Backend()
    torch.compile(f, backend=backend, fullgraph=True)(x64(3, 8))
    assert backend.count(aten.layer_norm.default) == 0
    assert backend.count(aten.dropout.default) == 1 and backend.count(aten.rand.default) == 1


def test_random_numbers_keep_count_and_order() -> None:
    same(Stack(p=0.3).double(), x64(3, 8, grad=True))


def test_tensor_constants_reach_inductor_once() -> None:
    def f(x: Tensor) -> Tensor:
        mask = torch.tensor([1.0, 0.0] * 4, dtype=torch.float64)
        mask[0] += 1
        return x * mask + torch.tensor(2.0, dtype=torch.float64) + torch.tensor([3])[0]

    backend = same(f, x64(3, 8, grad=True))
    constants = [s for s in backend.seen[0].sources.values() if s.kind == "constant"]
    assert len(constants) == 2


# ---------------------------------------------------------------- dynamic shapes


def test_dynamic_lengths() -> None:
    torch._dynamo.reset()
    model, backend = Stack().double(), Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    compiled(x64(2, 5, 8))
    calls = len(backend.seen)  # Dynamo may call a backend twice for one dynamic frame
    for n in (5, 7, 12):
        x = x64(2, n, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-13)
    assert len(backend.seen) == calls
    norms = backend.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert len(norms) == 3 and isinstance(norms[0].meta["val"].shape[1], torch.SymInt)


def test_automatic_dynamic_lengths() -> None:
    model, backend, calls = Stack().double(), Backend(), []
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (5, 7, 12, 20):
        x = x64(2, n, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-13)
        calls.append(len(backend.seen))
    assert calls[1] == calls[-1]


def test_dynamic_with_carried_nodes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.custom = Block(p=0.2), Custom()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.block, x, use_reentrant=False)
            return self.custom(x).reshape(x.shape[0] * x.shape[1], -1)

    backend = same(Model().double(), x64(2, 5, 8, grad=True), dynamic=True)
    assert backend.count(aten.layer_norm.default) == 2
    assert backend.count(torch.ops.higher_order.autograd_function_apply) == 1


def test_unbacked_sizes() -> None:
    def f(x: Tensor) -> Tensor:
        return F.layer_norm(x[x.sum(-1) > 0], (8,)) + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        backend = same(f, x64(6, 8))
        assert backend.count(aten.layer_norm.default) == 1
        same(lambda x, n: torch.zeros(n.item(), 8, dtype=x.dtype) + x, x64(8), torch.tensor(3))


# ---------------------------------------------------------------- downstream


def _static_inputs(model: nn.Module, x: Tensor, with_capture: bool) -> list[int]:
    from torch._guards import TracingContext

    seen: list[list[int]] = []

    def lower(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(inner: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            context = TracingContext.try_get()
            assert context is not None and context.fw_metadata is not None
            seen.append(list(context.fw_metadata.static_input_indices))
            return inner.forward

        canonical = capture(gm, example_inputs).graph_module if with_capture else gm
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(canonical, example_inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=lower, fullgraph=True)(x)
    return seen[0]


def test_static_inputs_are_those_of_the_untouched_graph() -> None:
    model, x = nn.Sequential(Stack(), nn.BatchNorm1d(8)), torch.randn(3, 8)
    static = _static_inputs(model, x, with_capture=True)
    assert static and static == _static_inputs(model, x, with_capture=False)


def test_inductor() -> None:
    from torch._inductor.compile_fx import compile_fx

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    same(model, x64(3, 8, grad=True), backend=Backend(compile_fx))


def test_inductor_cache_hits() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    with torch.no_grad():
        torch.compile(model, backend=Backend(compile_fx), fullgraph=True)(x)
        torch._dynamo.reset()
        counters.clear()
        torch.compile(model, backend=Backend(compile_fx), fullgraph=True)(x)
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    assert hits and not counters["inductor"]["fxgraph_cache_miss"]


# ---------------------------------------------------------------- export


def test_exported_program() -> None:
    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale + torch.tensor([1.0] * 8)

    model = Model().eval()
    x = torch.randn(3, 8)
    ep = torch.export.export(model, (x,))
    captured = capture_exported(ep)
    assert captured.graph_module.graph is not ep.graph
    sources = {s.name: s.kind for s in captured.sources.values()}
    assert sources["h.0.norm.weight"] == "parameter" and sources["scale"] == "buffer" and sources["x"] == "input"
    assert "constant" in sources.values()
    norms = captured.graph_module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert [module_path(n) for n in norms] == ["h.0.norm", "h.1.norm", "norm_f"]
    before = str(ep.graph)
    captured.graph_module.graph.erase_node(captured.graph_module.graph.output_node())
    assert str(ep.graph) == before
    verify(ep.graph_module, "export")
