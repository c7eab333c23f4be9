"""The traps of docs/maths.md: each refused with a reason where it must be, and right in float64 in every case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import assert_same_float64
from torch import Tensor, nn
from torch.nn import functional as F

from normfx.report import Report


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _check(model: nn.Module, *inputs: Any) -> Report:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return assert_same_float64(model.eval(), inputs)


def _codes(report: Report, site: int, rule: str = "pre_rms_norm") -> list[str]:
    return [r.code for r in report.sites[site].refusals if r.rule == rule]


class Branches(nn.Module):
    """x + write(norm(x)), then a norm read by a linear; `write` is the trap."""

    def __init__(self, write: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(10, width)
        self.norm, self.write = nn.LayerNorm(width), write
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.write(self.norm(x))
        return self.head(self.final(x))


IDS = torch.arange(8).reshape(2, 4)


class Depthwise(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("groups", "converted"), [(1, 2), (4, 1), (8, 1)])
def test_t1_grouped_convolution(groups: int, converted: int) -> None:
    """P mixes the channels of different groups: a grouped convolution is no writer that can be centred."""
    report = _check(Branches(Depthwise(groups)), IDS)
    assert report.counts["to_rms_norm"] == converted
    assert _codes(report, 1) == ([] if groups == 1 else ["uncentred_input"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.norm, self.write, self.final = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.write(self.norm(x))
        return F.linear(self.final(x), self.table.weight)


def test_t2_tied_embedding() -> None:
    """The table is centred where it writes and left as it is where the head reads it."""
    report = _check(Tied(), IDS)
    assert report.counts["to_rms_norm"] == 2 and report.counts["fold_affine"] == 2
    assert report.graphs[0].after.count("center(table.weight") == 0


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.writes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, write in zip(self.norms, self.writes, strict=True):
            x = norm(x + torch.relu(write(x)))
        return x


def test_t3_post_norm() -> None:
    report = _check(PostNorm(), _x(2, 4, 8))
    assert report.counts["to_rms_norm"] == 0
    assert all(_codes(report, i) for i in range(3))


class PatchMerging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.reduce = nn.Embedding(10, 8), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.reduce(self.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1)))


def test_t4_concatenation_along_features() -> None:
    report = _check(PatchMerging(), IDS)
    assert _codes(report, 0) == ["uncentred_input"] and report.sites[0].rules == ("fold_affine",)


class TokenMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


def test_t5_token_mixing_writer() -> None:
    """A token mixer's own weight cannot centre what it writes; the norm before it still converts."""
    report = _check(Branches(TokenMixer()), IDS)
    assert _codes(report, 0) == [] and _codes(report, 1) == ["uncentred_input"]


class MixedReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.read(y) * torch.sigmoid(y)


def test_t6_not_every_reader_is_linear() -> None:
    report = _check(MixedReaders(), _x(2, 4, 8))
    assert _codes(report, 0, "fold_affine") == ["reader_not_linear"]


class SharedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.read = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.read(self.first(x)))
        return self.read(self.second(x))


def test_t7_shared_weight_with_two_affines() -> None:
    report = _check(SharedWeights(), _x(2, 4, 8))
    assert all(_codes(report, i, "fold_affine") == ["shared_weight"] for i in range(2))


class BiasFree(nn.Module):
    """x/sqrt(var(x) + ε)·w: its numerator keeps the mean, so it is no LayerNorm and reads the stream's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.write = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.write(x)
        return self.norm(x) + x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * self.weight


def test_t9_bias_free_norm_is_an_observer() -> None:
    report = _check(BiasFree(), IDS)
    assert report.counts["layer_norm"] == 1 and _codes(report, 0) == ["observed"]


class Prefix(nn.Module):
    """pRMSNorm: statistics of the first entries only."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x * torch.rsqrt(x[..., :4].pow(2).mean(-1, keepdim=True) + 1e-6))


def test_t9_prefix_norm_is_not_recognised() -> None:
    assert _check(Prefix(), _x(2, 4, 8)).sites == ()


class OnePlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight))


def test_t10_one_plus_weight() -> None:
    report = _check(OnePlus(), _x(2, 4, 8))
    assert report.counts["fold_affine"] == 1 and "add" in report.graphs[0].after


class AdaptiveNorm(nn.Module):
    """Scale, shift and gate computed from a condition (adaLN-Zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.modulation = nn.Embedding(10, 8), nn.Linear(5, 24)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.write, self.final = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)[:, None].chunk(3, -1)
        x = self.table(ids)
        x = x + gate * self.write(self.norm(x) * (1 + scale) + shift)
        return self.final(x)


def test_t11_data_dependent_affine_and_gate() -> None:
    report = _check(AdaptiveNorm(), IDS, _x(2, 5))
    assert _codes(report, 0, "fold_affine") == ["no_affine"]
    assert _codes(report, 1) == ["uncentred_input"]


class Double(torch.autograd.Function):
    """A custom function whose backward is not its derivative: it must survive as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7.0


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(self.write(x))


def test_t12_custom_autograd_function() -> None:
    report = _check(Branches(Custom()), IDS)
    assert _codes(report, 0) == [] and _codes(report, 1) == ["uncentred_input"]


def test_t12_encoder_fast_path_is_expanded() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    model.requires_grad_(False)
    with torch.no_grad():
        report = _check(model, _x(2, 4, 8))
    assert report.counts["layer_norm"] == 5 and report.counts["to_rms_norm"] == 5
