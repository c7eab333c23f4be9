"""Attention by the kernel of normfx in graphs: where it is taken, where it is not, what is measured; under Inductor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import Marks
from measuring import another_process, fresh_measurements
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from normfx.compat.attention import flash
from normfx.lower import attention, measurements
from normfx.lower.attention import ATTENTION, FasterAttention, Shapes, with_attention
from normfx.lower.passes import HOOK


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_measurements(monkeypatch, tmp_path)


def traced(body: Any, *inputs: Any) -> GraphModule:
    return make_fx(body, tracing_mode="fake")(*inputs)


def replaced(body: Any, *inputs: Any, measured: bool = False) -> bool:
    """Whether the pass replaces the attention of a graph, which then computes the same."""
    gm = traced(body, *inputs)
    assert gm.graph.find_nodes(op="call_function", target=flash())
    FasterAttention(measured)(gm.graph)
    gm.recompile()
    out, theirs = gm(*inputs), body(*inputs)
    assert (out - theirs).norm() <= (1e-2 if out.dtype == torch.bfloat16 else 1e-6) * theirs.norm()
    return bool(gm.graph.find_nodes(op="call_function", target=ATTENTION))


Q, K, V = (torch.randn(2, 4, 64, 32) for _ in range(3))


def test_what_is_replaced() -> None:
    sdpa = scaled_dot_product_attention
    assert replaced(sdpa, Q, K, V)
    assert replaced(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3), Q, K, V)
    assert replaced(sdpa, Q, K, V, torch.randn(64, 64))
    assert replaced(sdpa, Q, K, V, torch.rand(2, 1, 1, 64) < 0.5)
    assert replaced(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), Q, K[:, :2], V[:, :2])
    assert replaced(sdpa, Q.bfloat16(), K.bfloat16(), V.bfloat16())


def test_without_a_compiler_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention._LIBRARY, "_loaded", [None])
    assert not replaced(scaled_dot_product_attention, Q, K, V)


@pytest.mark.parametrize("repeat", ["enable_gqa", "expand", "repeat_interleave", "other order", "written"])
def test_repeated_heads(repeat: str) -> None:
    """Heads that a group of queries share are read once, in the order of the groups."""

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat == "enable_gqa":
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if repeat == "repeat_interleave":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        elif repeat == "other order":
            k, v = (t[:, None].expand(2, 2, 2, 64, 32).reshape(2, 4, 64, 32) for t in (k, v))
        else:
            k, v = ((t * 1)[:, :, None].expand(2, 2, 2, 64, 32).reshape(2, 4, 64, 32) for t in (k, v))
        return scaled_dot_product_attention(q, k, v)

    inputs = Q, K[:, :2].contiguous(), V[:, :2].contiguous()
    gm = traced(body, *inputs)
    (node,) = gm.graph.find_nodes(op="call_function", target=flash())
    if repeat == "written":
        source = node.args[1]
        while source.target is not torch.ops.aten.mul.Tensor:
            source = source.all_input_nodes[0]
        with gm.graph.inserting_before(node):
            written = gm.graph.call_function(torch.ops.aten.add_.Tensor, (source, 1.0))
        written.meta["val"] = source.meta["val"]
    gm.recompile()
    expected = gm(*inputs)
    FasterAttention(measured=False)(gm.graph)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=1e-6)
    (node,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert node.args[1].meta["val"].shape[1] == (4 if repeat in ("other order", "written") else 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_is_left_alone(dtype: torch.dtype) -> None:
    gm = traced(scaled_dot_product_attention, *(t.to(dtype) for t in (Q, K, V)))
    assert gm.graph.find_nodes(op="call_function", target=flash())
    FasterAttention(measured=False)(gm.graph)
    assert not gm.graph.find_nodes(op="call_function", target=ATTENTION)


def test_dropout_is_left_alone() -> None:
    gm = traced(lambda q, k, v: flash()(q, k, v, 0.0, False)[0], Q, K, V)
    (node,) = gm.graph.find_nodes(op="call_function", target=flash())
    node.args = (*node.args[:3], 0.5, False)
    FasterAttention(measured=False)(gm.graph)
    assert node.target is flash()


def test_measured_once_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster of both is taken; other sizes of a class, and later processes, do not measure again."""
    calls: list[Shapes] = []
    monkeypatch.setattr(attention, "_measure", lambda shapes: calls.append(shapes) or (2.0, 1.0))
    assert replaced(scaled_dot_product_attention, Q, K, V, measured=True)
    assert replaced(scaled_dot_product_attention, Q[:, :, :60], K, V, measured=True)
    assert calls == [Shapes(False, 8, 64, 64, 32, False, False)]
    another_process(monkeypatch)
    assert replaced(scaled_dot_product_attention, Q, K, V, measured=True) and len(calls) == 1
    monkeypatch.setattr(attention, "_measure", lambda shapes: (1.0, 1.0))
    assert not replaced(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), Q, K, V, measured=True)


@pytest.mark.parametrize("shapes", [Shapes(False, 2, 8, 16, 8, True, False), Shapes(True, 2, 16, 8, 8, False, True)])
def test_a_measurement(shapes: Shapes) -> None:
    """It measures even where a caller traces, records nothing and runs autocast."""
    with torch.inference_mode(), torch.autocast("cpu"):
        assert attention.is_faster(shapes) in (True, False)
    known = json.loads(measurements.path(attention._file()).read_text())
    ((torchs, own, *_),) = [found for key, found in known.items() if not key.startswith("bfloat16")]
    assert 0 < torchs < 100 and 0 < own < 100


@given(*(st.integers(1, 40_000) for _ in range(4)))
def test_classes(count: int, queries: int, keys: int, width: int) -> None:
    """Bounded work, and a class is its own class."""
    of_class = attention._class(Shapes(False, count, queries, keys, width, False, False))
    assert 4 * math.prod(of_class[1:5]) <= attention.MOST
    assert 3 * of_class.heads * max(of_class.queries, of_class.keys) * of_class.width <= attention.MOST_ENTRIES
    assert attention._class(of_class) == of_class


def test_a_pass_of_the_users_runs_first() -> None:
    marks = Marks()
    patches = with_attention({HOOK: marks}, "normfx")
    gm = traced(lambda q, k, v: torch.mm(scaled_dot_product_attention(q, k, v)[0, 0], v[0, 0].T), Q, K, V)
    patches[HOOK](gm.graph)
    assert marks.seen == 1 and gm.graph.find_nodes(op="call_function", target=ATTENTION)
    assert with_attention({HOOK: Marks(None)}, "normfx")[HOOK].uuid() is None  # it may not be cached
    assert with_attention({}, "normfx")[HOOK].uuid() != with_attention({}, "auto")[HOOK].uuid()
    assert with_attention({"epilogue_fusion": True}, "aten") == {"epilogue_fusion": True}


# ---------------------------------------------------------------- Inductor


class Block(nn.Module):
    """Pre-norm attention."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.count, -1)).unbind(-3)
        mixed = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="normfx", options={"attention": "normfx", "strict": True, **options})


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_training_step(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's backward reads the kernel's output and sums: every gradient, by its error against float64."""
    torch.manual_seed(0)
    calls: list[int] = []
    real = attention._view
    monkeypatch.setattr(attention, "_view", lambda tensor: calls.append(1) or real(tensor))
    model, wide = Block(64, 4), Block(64, 4).double()
    wide.load_state_dict(model.state_dict())
    x = torch.randn(2, 50, 64)
    run = torch.compile(model, backend="normfx", dynamic=dynamic, options={"attention": "normfx", "strict": True})
    errors = []
    wide(x.double()).square().sum().backward()
    for call in (model, run):
        model.zero_grad()
        call(x).square().sum().backward()
        pairs = list(zip(model.parameters(), wide.parameters(), strict=True))
        errors.append(max(float((p.grad - w.grad).norm() / w.grad.norm()) for p, w in pairs))
    assert calls and errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("fold", ["cached", "frozen", "live"])
def test_inference_in_lengths(fold: str) -> None:
    torch.manual_seed(0)
    model = Block(64, 4).eval()
    run = compiled(model, fold=fold)
    with torch.no_grad():
        for tokens in (40, 41, 97, 40):
            x = torch.randn(2, tokens, 64)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_attention_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_measure", lambda shapes: pytest.fail("measured"))
    model, x = Block(64, 4).eval(), torch.randn(2, 40, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, attention="aten")(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "Mistral", "Bert", "ViT", "Llama"])
def test_models(name: str) -> None:
    """Masks and layouts of real models: causal, sliding windows, grouped heads."""
    import transformers

    torch.manual_seed(0)
    text = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    window = {"num_key_value_heads": 2, "sliding_window": 24, "head_dim": 16}
    made: dict[str, Any] = {
        "GPT2": lambda t: t.GPT2Model(t.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=97)),
        "Mistral": lambda t: t.MistralModel(t.MistralConfig(**text, **window)),
        "Bert": lambda t: t.BertModel(t.BertConfig(**text)),
        "Llama": lambda t: t.LlamaModel(t.LlamaConfig(**text, num_key_value_heads=2)),
        "ViT": lambda t: t.ViTModel(t.ViTConfig(**{k: v for k, v in text.items() if k != "vocab_size"}, image_size=96)),
    }
    model = made[name](transformers).eval()
    x = torch.randn(2, 3, 96, 96) if name == "ViT" else torch.randint(97, (2, 80))
    more = {} if name == "ViT" else {"attention_mask": (torch.arange(80) >= torch.tensor([[0], [13]])).long()}
    run = compiled(model)
    with torch.no_grad():
        wanted = model.double()(x.double() if name == "ViT" else x, **more).last_hidden_state
        model.float()
        eager, own = model(x, **more).last_hidden_state, run(x, **more).last_hidden_state
    seen = torch.ones(2, wanted.shape[1]) if name == "ViT" else more["attention_mask"]
    error = [float((out - wanted)[seen.bool()].norm()) for out in (eager, own)]
    assert error[1] <= 2 * error[0]
