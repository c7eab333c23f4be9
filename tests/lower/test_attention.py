"""Attention by the kernel of normfx: what torch's computes, to its error."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import fresh_measurements
from torch import Tensor

from normfx.compat.attention import attend, empty_results
from normfx.lower import attention
from normfx.lower.attention import ATTENTION

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
    """The op is torch's."""
    monkeypatch.setattr(attention._LIBRARY, "_loaded", [None])
    q, k, v = (heads(1, 2, 40, 16) for _ in range(3))
    for one, other in zip(ATTENTION(q, k, v, None, True, None), attend(q, k, v, None, True, None), strict=True):
        assert torch.equal(one, other)
    compare(heads(1, 4, 40, 16), k, v)  # heads of keys for groups of queries
    apart = torch.randn(1, 2, 16, 40).transpose(2, 3)  # entries of a row do not lie side by side
    compare(apart, apart * 2, v)
    assert ATTENTION(apart, k, v, None, False, None)[0].stride() == empty_results(apart)[0].stride()


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
