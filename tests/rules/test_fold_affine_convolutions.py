"""fold_affine: γ and β of a norm over channels move into convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_low_precision, assert_same_float64
from rule_test import moved
from torch import Tensor, nn

CHANNELS = 6


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (N, C, …), by permutations (ConvNeXt's, timm's LayerNorm2d)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class WrittenChannelNorm(nn.Module):
    """The same in single ops, as ConvNeXt's own code has it."""

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        y = self.weight[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6))
        return y if self.bias is None else y + self.bias[:, None, None]


def _conv(*args: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(CHANNELS, 4, *args, **options)


READERS: dict[str, tuple[nn.Module, str, str]] = {
    "patches": (_conv(2, 2), "applied", "applied"),
    "without a bias": (_conv(2, 2, bias=False), "applied", "applied"),
    "strided, dilated": (_conv(2, (2, 1), dilation=(1, 2)), "applied", "applied"),
    "valid": (_conv(3, padding="valid"), "applied", "applied"),
    "1×1, same": (_conv(1, padding="same"), "applied", "applied"),
    "groups": (_conv(2, groups=2), "applied", "applied"),
    "depthwise": (nn.Conv2d(CHANNELS, 2 * CHANNELS, 2, groups=CHANNELS), "applied", "applied"),
    "padded": (_conv(3, padding=1), "padded_reader", "applied"),
    "padded, depthwise": (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), "padded_reader", "applied"),
    "same": (_conv(3, padding="same"), "padded_reader", "applied"),
    "circular": (_conv(3, padding=1, padding_mode="circular"), "applied", "applied"),
    "transposed": (nn.ConvTranspose2d(CHANNELS, 4, 3), "padded_reader", "applied"),
    "transposed, groups": (nn.ConvTranspose2d(CHANNELS, 4, 2, groups=2), "padded_reader", "applied"),
}
"""Each convolution, and what becomes of a norm with a β before it, and of one without."""


@pytest.mark.parametrize("case", READERS)
@pytest.mark.parametrize("bias", [True, False])
def test_readers(case: str, bias: bool) -> None:
    torch.manual_seed(0)
    reader, *wanted = READERS[case]
    model = moved(nn.Sequential(ChannelNorm(CHANNELS, bias=bias), reader))
    _decided(model, wanted[not bias], torch.randn(2, CHANNELS, 5, 6))


def _decided(model: nn.Module, wanted: str, x: Tensor, rules: str = "fold_affine") -> None:
    report = assert_same_float64(model, (x,), {"rules": rules})
    (site,) = (site for site in report.sites if site.kind != "BatchNorm")
    codes = [refusal.code for refusal in site.refusals if refusal.rule == "fold_affine"]
    assert (["applied"] if "fold_affine" in site.rules else codes) == [wanted]


@pytest.mark.parametrize("rules", ["fold_affine", "all"])
def test_written_norm_in_one_and_three_dimensions(rules: str) -> None:
    torch.manual_seed(0)
    _decided(
        moved(nn.Sequential(WrittenChannelNorm(CHANNELS), _conv(2, 2))),
        "applied",
        torch.randn(2, CHANNELS, 4, 4),
        rules,
    )
    line = nn.Sequential(ChannelNorm(CHANNELS), nn.Conv1d(CHANNELS, 4, 3))
    _decided(moved(line), "applied", torch.randn(2, CHANNELS, 7), rules)
    volume = nn.Sequential(ChannelNorm(CHANNELS), nn.Conv3d(CHANNELS, 4, 2))
    _decided(moved(volume), "applied", torch.randn(2, CHANNELS, 3, 3, 3), rules)


class TokensToChannels(nn.Module):
    """Convolutions along tokens, of which the first one is read by a second norm, and a number on the way."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.enter = nn.Linear(4, CHANNELS)
        self.norm, self.again = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.convolution = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=padding)
        self.read = nn.Conv1d(CHANNELS, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(self.norm(self.enter(x)).transpose(1, 2) * 0.5).transpose(1, 2)
        out: Tensor = self.read(self.again(y).transpose(1, 2))
        return out


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("training", [False, True])
def test_convolution_as_writer_and_reader(padding: int, training: bool) -> None:
    """γ moves into the input channels of a convolution whose output channels are centred."""
    torch.manual_seed(0)
    for rules in ("default", "all"):
        model = moved(TokensToChannels(padding)).train(training)
        report = assert_same_float64(model, (torch.randn(2, 7, 4) + 0.5,), {"rules": rules})
        by_name = {site.name: set(site.rules) for site in report.sites}
        assert {"linear_norm", "fold_affine"} <= by_name["again"] or {"pre_rms_norm", "fold_affine"} <= by_name["again"]
        assert ("fold_affine" in by_name["norm"]) is (padding == 0)


def test_convolution_between_two_norms_of_either_kind() -> None:
    """A BatchNorm after the convolution folds into what the LayerNorm before it was folded into."""
    torch.manual_seed(0)
    model = moved(nn.Sequential(ChannelNorm(CHANNELS), _conv(2, 2, groups=2), nn.BatchNorm2d(4))).eval()
    model[2].running_mean.copy_(torch.randn(4))
    report = assert_same_float64(model, (torch.randn(2, CHANNELS, 4, 4),))
    assert [set(site.rules) & {"fold_affine", "fold_batch_norm"} for site in report.sites] == [
        {"fold_affine"},
        {"fold_batch_norm"},
    ]


def test_low_precision() -> None:
    torch.manual_seed(0)
    model = moved(nn.Sequential(ChannelNorm(CHANNELS), _conv(2, 2))).eval()
    batches = [(torch.randn(4, CHANNELS, 8, 8) + 0.5,) for _ in range(8)]
    for dtype in (torch.float32, torch.bfloat16):
        assert_low_precision(model, batches, EagerBackend(), dtype)
