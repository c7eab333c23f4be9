"""What one entry of the zoo is, and what its entries are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Tensor, ...]]

VOCABULARY = 100


@dataclass(frozen=True)
class Family:
    """A published architecture: the library's own class, random weights, few features a row.

    package: the library it comes from
    depth:   what of the published depth is built, where it is not all of it
    """

    name: str
    package: str
    build: Build
    inputs: Inputs
    depth: str = ""

    def make(self) -> nn.Module:
        """The model in eval, the same at every call, ready to show a wrong fold."""
        torch.manual_seed(0)
        return calibrated(moved(self.build().eval()), self.inputs())


def moved(model: nn.Module) -> nn.Module:
    """The model with its norms, biases and scales, and whatever else is constant when fresh, moved off their ones and
    zeros, and its weights as large as keeps rows of unit size: with ones, or where what a norm makes vanishes after
    small weights, a wrong fold would not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() > 1:
                if p.ndim <= 1 or bool((p == p.flatten()[0]).all()):
                    p.add_(0.3 * torch.randn_like(p))
                if p.ndim > 1:
                    p.mul_(p[0].numel() ** -0.5 / p.std())
    return model


def calibrated(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """The model with each BatchNorm's statistics those of these inputs, as after training. With a fresh one's, what
    comes through a dozen of them is next to nothing, and so is a wrong fold before them."""
    found = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in found:
        norm.momentum = None  # the average of all calls, which are one
        norm.train()
    if found:
        with torch.no_grad():
            model(*inputs)
    return model.eval()


class Call(nn.Module):
    """A library model as a function of tensors: `inputs` names its arguments, `output` the field of what it returns."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], output: str, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.inputs, self.output, self.fixed = model, inputs, output, dict(fixed)

    def forward(self, *inputs: Tensor) -> Any:
        found = self.model(**dict(zip(self.inputs, inputs, strict=True)), **self.fixed)
        return getattr(found, self.output) if self.output else found


def ids(*shape: int, below: int = VOCABULARY) -> Inputs:
    """Token numbers; 0 and 1, which often mean padding, are left out."""
    return lambda: (torch.randint(2, below, shape or (2, 16), generator=_generator()),)


def floats(*shape: int) -> Inputs:
    return lambda: (torch.randn(shape, generator=_generator()),)


def both(*parts: Inputs) -> Inputs:
    """The inputs of all parts, in order."""
    return lambda: tuple(tensor for part in parts for tensor in part())


def image(size: int = 224) -> Inputs:
    return floats(2, 3, size, size)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
