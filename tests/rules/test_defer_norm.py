"""defer_norm on whole models, in every form of norm and linear, and its error in float32 next to eager's own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_same_float64
from rule_test import moved
from torch import Tensor, nn

from normfx.report import Report

SMALL = {"rules": "default,+defer_norm", "defer_means": "small"}
BOUND = 1.25
"""Error against float64 as a multiple of eager's."""


def decided(report: Report) -> tuple[int, Counter[str]]:
    """How many norms were deferred, and why the others were not."""
    refusals = (r.code for site in report.sites for r in site.refusals if r.rule == "defer_norm")
    return sum("defer_norm" in site.rules for site in report.sites), Counter(refusals)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class NormFormer(nn.Module):
    """A feed-forward block with a norm before it and one inside."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.before, self.inside = nn.LayerNorm(d), nn.LayerNorm(3 * d)
        self.up, self.down = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inside(F.gelu(self.up(self.before(x)))))


class Written(nn.Module):
    """A norm written out: ε and divisor in the places that users choose; read through views, by addmm and by mm."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.gain = form, nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.weight, self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 24).reshape(6, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "squares":
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)
        elif self.form == "outside":
            y = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1)
        else:
            y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1).sqrt()
        flat = (y * self.gain).reshape(-1, 6)
        return F.gelu(torch.addmm(self.bias, flat, self.weight)) * torch.sigmoid(torch.mm(flat, self.weight))


@pytest.mark.parametrize("form", ["squares", "outside", "unbiased"])
def test_forms(form: str) -> None:
    report = assert_same_float64(Written(form), (rows(2, 5, 6),), SMALL)
    assert decided(report) == (1, Counter())


class Routed(nn.Module):
    """Rows that are moved, picked and repeated between the norm and its readers: each has its own factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        windows = y.view(2, 2, 2, 6).transpose(1, 2).reshape(2, 4, 6)
        return torch.tanh(self.one(windows)) + torch.tanh(self.two(torch.roll(y, 1, 1)[:, :1]))


def test_rows_that_move() -> None:
    model, x = moved(Routed()), rows(2, 4, 6) * torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    report = assert_same_float64(model, (x,), SMALL)
    assert decided(report) == (1, Counter())


class Other(nn.Module):
    """A norm whose readers take γ and β, but are not rows times a matrix of parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm, self.weight = kind, nn.LayerNorm(6), nn.Parameter(torch.randn(4, 6))
        self.convolution = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "convolution":
            return torch.relu(self.convolution(y.transpose(1, 2)))
        if self.kind == "columns":
            return torch.relu(self.weight @ y.transpose(1, 2))
        if self.kind == "tensordot":
            return torch.relu(torch.tensordot(self.weight, y, ([1], [2])))
        return torch.relu(F.linear(y, self.weight * torch.sigmoid(x.mean())))


@pytest.mark.parametrize("kind", ["convolution", "columns", "tensordot", "a weight of data"])
def test_other_readers(kind: str) -> None:
    report = assert_same_float64(moved(Other(kind)), (rows(2, 4, 6),), SMALL)
    assert decided(report) == (0, Counter({"reader_not_linear": 1}))


@pytest.mark.parametrize("training", [False, True])
def test_normformer(training: bool) -> None:
    """The inner norm and, where the block is compiled alone, the one before it."""
    report = assert_same_float64(moved(NormFormer()).train(training), (rows(2, 4, 8),), SMALL)
    assert decided(report) == (2, Counter())
    report = assert_same_float64(moved(NormFormer()).train(training), (rows(2, 4, 8),), {"rules": SMALL["rules"]})
    assert decided(report) == (0, Counter({"unknown_mean": 2}))


def gpt2() -> tuple[nn.Module, tuple[Tensor, ...], int, dict[str, int]]:
    """One block of GPT-2, compiled alone: q, k and v are one product, which attention reads."""
    transformers = pytest.importorskip("transformers")
    dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, attn_implementation="sdpa", **dropout)
    block = transformers.models.gpt2.modeling_gpt2.GPT2Block(config, 0)
    return First(block), (rows(2, 5, 16),), 1, {"no_gain": 1}


def bert() -> tuple[nn.Module, tuple[Tensor, ...], int, dict[str, int]]:
    """Post-norm: the residual add reads each norm too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(2, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    return First(transformers.BertModel(config, add_pooling_layer=False)), (ids,), 0, {"returned": 1}


def swin() -> tuple[nn.Module, tuple[Tensor, ...], int, dict[str, int]]:
    """Norms before the feed-forward parts are deferred; q, k and v are one product, which attention reads."""
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
    model = timm.models.swin_transformer.SwinTransformer(num_classes=3, drop_path_rate=0.0, **small)
    return model, (rows(1, 3, 32, 32),), 3, {"no_gain": 4}


class First(nn.Module):
    """The first output of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        out = self.model(*inputs)
        return out if isinstance(out, Tensor) else out[0]


Made = Callable[[], tuple[nn.Module, tuple[Tensor, ...], int, dict[str, int]]]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [gpt2, bert, swin])
def test_models(make: Made, training: bool) -> None:
    """Outputs and every gradient in float64, and what was decided."""
    torch.manual_seed(0)
    model, inputs, applied, codes = make()
    report = assert_same_float64(moved(model).train(training), inputs, SMALL)
    count, found = decided(report)
    assert count == applied and all(found[code] >= n for code, n in codes.items()), f"{count} deferred, {found}"


class Stack(nn.Module):
    """Pre-norm blocks on a stream that is centred, or norms of graph inputs whose means are small."""

    def __init__(self, kind: str, d: int = 128) -> None:
        super().__init__()
        self.kind = kind
        made: Any = nn.RMSNorm if kind == "rms" else nn.LayerNorm
        self.start, self.norms = nn.Linear(d, d), nn.ModuleList(made(d, eps=1e-5) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(d, 2 * d) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        stream = x if self.kind == "input" else self.start(x)
        out = torch.zeros_like(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            wrote = down(F.gelu(up(norm(stream))))
            out = out + wrote
            stream = stream if self.kind == "input" else stream + wrote
        return out


@pytest.mark.parametrize("weights", ["plain", "mean", "outlier", "tiny"])
@pytest.mark.parametrize("kind", ["stream", "rms", "input"])
def test_error_in_float32(kind: str, weights: str) -> None:
    """Weights that look trained; the rows of "input" have means of half their deviation."""
    torch.manual_seed(0)
    model = Stack(kind).eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(1 + 0.3 * torch.randn_like(norm.weight))
            if weights == "tiny":
                norm.weight.mul_(0.01)
            if weights == "outlier":
                norm.weight[3], norm.weight[7] = 0.05, 5.0
        for linear in (model.start, *model.ups, *model.downs):
            shift = float(weights == "mean")
            linear.weight.copy_((shift + torch.randn_like(linear.weight)) / (3 * linear.in_features) ** 0.5)
            linear.bias.copy_(shift + 0.3 * torch.randn_like(linear.bias))
        if weights == "outlier":
            for linear in (model.start, *model.downs):
                linear.bias[3] += 20.0
    x = rows(512, 128) + (0.5 if kind == "input" else 0.0)
    backend = EagerBackend({**SMALL, "fold": "cached"})
    torch._dynamo.reset()
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        got, eager = torch.compile(model, backend=backend, fullgraph=True)(x), model(x)
    assert decided(backend.report)[0] == 3
    ratio = ((got - want).norm() / (eager - want).norm()).item()
    assert ratio <= BOUND, ratio
