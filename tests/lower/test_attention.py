"""Attention by the kernel of normfx: what torch's computes, to its error; where it is taken, and where it is not."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import Marks
from measuring import another_process, fresh_measurements
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from normfx.compat.attention import attend, empty_results, flash
from normfx.lower import attention, measurements
from normfx.lower.attention import ATTENTION, FasterAttention, Shapes, with_attention
from normfx.lower.passes import HOOK

LOWEST = -math.inf


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_measurements(monkeypatch, tmp_path)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log Σ exp in float64; rows without any key are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = q.double() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores + torch.full(scores.shape[2:], LOWEST, dtype=torch.float64).triu(1)
    sums = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num() @ v, torch.where(sums == LOWEST, 0.0, sums)


def compare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    roundings: float = 0.5,
) -> None:
    """The kernel's error is at most 1.25 times that of torch's op, in the norm of the whole output, and a number of
    roundings of each entry: with few entries the op's own error is small by chance."""
    out, sums = ATTENTION(q, k, v, mask, causal, scale)
    groups = q.shape[1] // k.shape[1]
    dense = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))  # else torch's op computes NaN
    first, *others = dense
    theirs, their_sums = attend(first, *(t.repeat_interleave(groups, 1) for t in others), mask, causal, scale)
    assert out.dtype == q.dtype and (first is not q or out.stride() == theirs.stride())
    assert sums.stride() == their_sums.stride()
    wanted, wanted_sums = exact(q, k, v, mask, causal, scale)
    unit = torch.finfo(q.dtype).eps / 2 * wanted.norm()  # a rounding of each entry
    assert (out - wanted).norm() <= 1.25 * (theirs - wanted).norm() + roundings * unit
    torch.testing.assert_close(sums.double(), wanted_sums, rtol=1e-6, atol=1e-5 if q.dtype == torch.float32 else 1e-3)


def heads(sequences: int, count: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with a mean and an outlier, as trained models have, in the layout of a linear layer's result."""
    x = torch.randn(sequences, tokens, count, width) + 0.5
    x[..., 0] *= 4
    return x.to(dtype).transpose(1, 2)


def masks(sequences: int, count: int, queries: int, keys: int) -> dict[str, Tensor]:
    """Masks as models make them, by name."""
    past = torch.full((queries, keys), LOWEST).triu(1 + keys - queries if keys >= queries else 1)
    near = past.masked_fill(torch.ones(queries, keys).tril(-70).bool(), LOWEST)
    padded = torch.zeros(sequences, 1, 1, keys)
    padded[:, :, :, : keys // 3] = LOWEST
    lowest = torch.where(past == LOWEST, torch.finfo(torch.float32).min, 0.0).expand(sequences, 1, queries, keys)
    holes = torch.zeros(queries, keys).masked_fill(torch.rand(queries, keys) < 0.5, LOWEST)
    holes[:, 16 : 16 + keys // 2] = LOWEST
    nothing = torch.zeros(queries, keys)
    nothing[queries // 2] = LOWEST
    return {
        "past": past,
        "near past": near.expand(sequences, 1, queries, keys),
        "padding": padded,
        "padding, all rows": padded.expand(sequences, count, queries, keys),
        "lowest numbers": lowest,
        "position": torch.randn(1, count, queries, keys),
        "holes": holes,
        "a query without keys": nothing,
        "one number a query": torch.randn(queries, 1).expand(queries, keys),
        "nothing": torch.zeros(queries, keys),
    }


SIZES = [
    (1, 6, 6, 197, 197, 64), (2, 4, 2, 130, 130, 32), (1, 3, 1, 300, 1100, 80), (2, 2, 2, 37, 530, 20),
    (1, 20, 20, 65, 65, 16), (1, 1, 1, 1, 1, 8), (3, 2, 2, 1, 70, 64), (1, 2, 2, 900, 17, 33), (1, 2, 1, 513, 513, 128),
    (2, 1, 1, 24, 16, 256),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_as_exact_as_torch(sizes: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sequences, count, key_heads, queries, keys, width = sizes
    q = heads(sequences, count, queries, width, dtype)
    k, v = (heads(sequences, key_heads, keys, width, dtype) for _ in range(2))
    compare(q, k, v, causal=causal)
    compare(q, k, v, causal=causal, scale=1.0 / width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", masks(1, 1, 8, 8))
@pytest.mark.parametrize("sizes", [(2, 4, 2, 130, 130, 32), (1, 2, 2, 100, 700, 64), (2, 3, 3, 5, 3, 8)])
def test_masks(sizes: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    """Blocks that a mask excludes are left out; rows without keys are 0, as torch's."""
    torch.manual_seed(0)
    sequences, count, key_heads, queries, keys, width = sizes
    q = heads(sequences, count, queries, width, dtype)
    k, v = (heads(sequences, key_heads, keys, width, dtype) for _ in range(2))
    given = masks(sequences, count, queries, keys)[mask]
    compare(q, k, v, given)
    compare(q, k, v, given.to(dtype))


@settings(deadline=None)  # the first call compiles
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_drawn_calls(data: st.DataObject, seed: int) -> None:
    """Any sizes, layouts and masks."""
    torch.manual_seed(seed)
    draw = data.draw
    sequences, groups, key_heads = (draw(st.integers(1, 3)) for _ in range(3))
    queries, keys = draw(st.integers(1, 150)), draw(st.integers(1, 600))
    width = draw(st.integers(1, 72))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    sizes = ((sequences, groups * key_heads, queries), (sequences, key_heads, keys), (sequences, key_heads, keys))
    layouts = {
        "heads of tokens": lambda n, h, t: torch.randn(n, t, h, width).transpose(1, 2),
        "tokens of heads": lambda n, h, t: torch.randn(n, h, t, width),
        "a part": lambda n, h, t: torch.randn(n, t, h, 3, width + 1)[..., 1, :width].transpose(1, 2),
        "entries apart": lambda n, h, t: torch.randn(n, h, width, t).transpose(2, 3),
        "one for all": lambda n, h, t: torch.randn(1, 1, t, width).expand(n, h, t, width),
    }
    q, k, v = (layouts[draw(st.sampled_from(sorted(layouts)))](*size).to(dtype) for size in sizes)
    how = draw(st.sampled_from(["causal", "none", *masks(1, 1, 8, 8)]))
    mask = masks(sequences, groups * key_heads, queries, keys).get(how)
    compare(q, k, v, mask, causal=how == "causal", roundings=2)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("sizes", [(1, 6, 6, 197, 197, 64), (2, 2, 2, 37, 530, 21), (1, 2, 1, 513, 513, 128)])
def test_bfloat16_operands(sizes: tuple[int, ...], pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers by one instruction, where the processor has it, or as float32 numbers."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "_pairs_are_faster", lambda: pairs)
    sequences, count, key_heads, queries, keys, width = sizes
    q = heads(sequences, count, queries, width, torch.bfloat16)
    k, v = (heads(sequences, key_heads, keys, width, torch.bfloat16) for _ in range(2))
    compare(q, k, v, causal=True)
    compare(q, k, v, masks(sequences, count, queries, keys)["holes"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_numbers_that_are_none(operand: int, value: float) -> None:
    """NaN and infinities reach the same rows as in torch's op."""
    torch.manual_seed(0)
    operands = [heads(1, 2, 40, 16) for _ in range(3)]
    operands[operand][0, 1, 7, 3] = value
    out, _ = ATTENTION(*operands, None, False, None)
    theirs, _ = attend(*operands, None, False, None)
    assert torch.equal(out.isfinite(), theirs.isfinite()) and not out.isfinite().all()
    torch.testing.assert_close(out, theirs, equal_nan=True)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00001])
def test_any_nan_stays(bits: int, queries: int) -> None:
    """Whatever bits a NaN has."""
    torch.manual_seed(0)
    q, k, v = (heads(1, 2, tokens, 16) for tokens in (queries, 40, 40))
    k.view(torch.int32)[0, 1, 7, 3] = bits
    out, _ = ATTENTION(q, k, v, None, False, None)
    theirs, _ = attend(q, k, v, None, False, None)
    assert torch.equal(out.isnan(), theirs.isnan()) and out.isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(threads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (heads(1, 5, 210, 24) for _ in range(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(q, k, v, causal=True)
    finally:
        torch.set_num_threads(before)


def test_many_threads_at_once() -> None:
    """Calls let go of the interpreter's lock; each has memory of its own."""
    torch.manual_seed(0)
    operands = [[heads(2, 3, tokens, 32) for _ in range(3)] for tokens in (40, 300, 90, 600)]
    wanted = [ATTENTION(*each, None, False, None)[0] for each in operands]
    wrong: list[int] = []

    def run(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(ATTENTION(*operands[i], None, False, None)[0], wanted[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(operands)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op is torch's, and no graph takes it."""
    monkeypatch.setattr(attention._LIBRARY, "_loaded", [None])
    q, k, v = (heads(1, 2, 40, 16) for _ in range(3))
    for one, other in zip(ATTENTION(q, k, v, None, True, None), attend(q, k, v, None, True, None), strict=True):
        assert torch.equal(one, other)
    compare(heads(1, 4, 40, 16), k, v)  # heads of keys for groups of queries
    apart = torch.randn(1, 2, 16, 40).transpose(2, 3)  # entries of a row do not lie side by side
    compare(apart, apart * 2, v)
    assert ATTENTION(apart, k, v, None, False, None)[0].stride() == empty_results(apart)[0].stride()
    assert not replaced(scaled_dot_product_attention, q, k, v)


# ---------------------------------------------------------------- the pass


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
def test_nothing_is_left_behind() -> None:
    """500 calls of changing sizes: each thread keeps the memory of its largest call, and no more."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    torch.manual_seed(0)
    sizes = [tuple(int(torch.randint(1, most, ())) for most in (4, 9, 700, 700, 130)) for _ in range(500)]

    def run() -> None:
        for sequences, count, queries, keys, width in sizes:
            q = torch.empty(sequences, count, queries, width).uniform_()
            k = torch.empty(sequences, count, keys, width).uniform_()
            ATTENTION(q, k, k, None, False, None)

    run()
    before = resident()
    run()
    assert resident() - before < 2**25


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
