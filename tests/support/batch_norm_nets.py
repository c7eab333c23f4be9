"""Random small nets of convolutions, linears, BatchNorms and what stands between, for fold_batch_norm."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval, with statistics and parameters as after training: means, outliers, a channel that is nearly off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                n = module.num_features
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.copy_(torch.randn(n, generator=generator))
                    module.running_var.copy_(torch.rand(n, generator=generator) + 0.3)
                    module.running_mean[-1] *= 10
                if module.affine:
                    module.weight.copy_(torch.randn(n, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(n, generator=generator))
                    module.weight[0] = 1e-3
    return model.eval()


class Net(nn.Module):
    """A chain of layers drawn by a seed, on (N, C, H, W), then on (N, C)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.steps: list[tuple[str, Any]] = []
        self.layers = nn.ModuleList()
        self.channels = 4
        for _ in range(draw.randint(2, 5)):
            self._image(draw)
        self.add("mean" if draw.random() < 0.7 else "flatten", None)
        if self.steps[-1][0] == "flatten":
            self.add("layer", nn.LazyLinear(6))
            self.channels = 6
        for _ in range(draw.randint(1, 3)):
            self._rows(draw)

    def add(self, kind: str, what: Any) -> None:
        if isinstance(what, nn.Module):
            self.layers.append(what)
            what = len(self.layers) - 1
        self.steps.append((kind, what))

    def _image(self, draw: random.Random) -> None:
        have, want = self.channels, draw.choice((4, 6, 8))
        groups = draw.choice([g for g in (1, 1, 2, have) if have % g == 0 and want % g == 0])
        kernel, padded = draw.choice((1, 3)), draw.random() < 0.5 or len(self.steps) > 4
        mode = draw.choice(("zeros", "zeros", "reflect", "circular"))
        made: nn.Module
        if draw.random() < 0.15:
            made = nn.ConvTranspose2d(have, want, 2, stride=2, groups=groups, bias=draw.random() < 0.5)
        else:
            made = nn.Conv2d(have, want, kernel, padding=int(padded and kernel > 1), padding_mode=mode, groups=groups,
                             bias=draw.random() < 0.5)  # fmt: skip
        before = draw.random() < 0.35
        if before:
            self.add("layer", nn.BatchNorm2d(have, affine=draw.random() < 0.8))
            if draw.random() < 0.3:
                self.add("scale", draw.choice((0.5, -2.0)))
        self.add("layer", made)
        self.channels = want
        if draw.random() < 0.15:
            self.add("tap", None)
        if not before or draw.random() < 0.5:
            self.add("layer", nn.BatchNorm2d(want, track_running_stats=draw.random() < 0.95))
        self.add(draw.choice(("relu", "relu_", "add_", "skip", "shift", "layout", "none")), None)

    def _rows(self, draw: random.Random) -> None:
        want = draw.choice((4, 6))
        if draw.random() < 0.4:
            self.add("layer", nn.BatchNorm1d(self.channels))
        self.add("layer", nn.Linear(self.channels, want, bias=draw.random() < 0.5))
        self.channels = want
        if draw.random() < 0.6:
            self.add("layer", nn.BatchNorm1d(want))
        self.add(draw.choice(("relu", "relu_", "skip", "none")), None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        taps: list[Tensor] = []
        skip = x
        for kind, what in self.steps:
            if kind == "layer":
                x = self.layers[what](x)
            elif kind == "scale":
                x = x * what
            elif kind == "tap":
                taps.append(x)
            elif kind == "relu":
                x = F.relu(x)
            elif kind == "relu_":
                x = F.relu(x, inplace=True)
            elif kind == "add_":
                x += 1.0
            elif kind == "skip":
                x, skip = (x + skip if x.shape == skip.shape else x), x
            elif kind == "shift":
                x = x + x.mean()
            elif kind == "layout":
                x = x.contiguous(memory_format=torch.channels_last)
            elif kind == "mean":
                x = x.mean((2, 3))
            elif kind == "flatten":
                x = x.flatten(1)
        return (x, *taps)


def net(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model, x = Net(seed).double().eval(), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x.clone())  # lazy layers
    return moved(model, seed), (x,)
