"""What a graph computes is stored as before: callers view it, and graphs read it with strides of their own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.utils._pytree as pytree
from branch_nets import Drawn, decided
from equivalence import transformed
from torch import Tensor, nn

from normfx.graph.nodes import memory_order
from normfx.rules.fold_batch_norm import moved

LAST = torch.channels_last
C = nn.Conv2d

NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "equal": lambda: [C(4, 4, 3, padding=1), C(4, 4, 3, padding=1)],
    "smaller": lambda: [C(4, 4, 3, padding=1, bias=False), C(4, 4, 1)],
    "batch norms": lambda: [nn.Sequential(C(4, 4, 3, padding=1), moved(nn.BatchNorm2d(4))), C(4, 4, 3, padding=1)],
    "in a row": lambda: [nn.Sequential(C(4, 32, 3, padding=1), C(32, 4, 1))],
    "in a row, added": lambda: [nn.Sequential(C(4, 32, 3, padding=1), C(32, 4, 1)), C(4, 4, 3, padding=1)],
    "and another": lambda: [C(4, 4, 3, padding=1), C(4, 4, 3, padding=1), nn.Sequential(nn.Tanh(), C(4, 4, 1))],
}

TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda y: y,
    "as strided": lambda y: y.as_strided((100,), (1,)) + 1.0,
    "viewed": lambda y: y.view(-1) if y.is_contiguous() else y.permute(0, 2, 3, 1).view(-1, 4),
}


class Net(nn.Module):
    def __init__(self, layers: list[nn.Module], tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.tail = nn.ModuleList(layers), tail

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return self.tail(total)


def same(model: nn.Module, x: Tensor, options: dict[str, str]) -> list[str]:
    """What became of sums, after a comparison of values and strides."""
    model = model.double().eval().requires_grad_(False)
    x = x.double()
    out, report = transformed(model, (x,), options)
    for found, wanted in zip(pytree.tree_leaves(out), pytree.tree_leaves(model(x)), strict=True):
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    return decided(report) + ["applied" for site in report.composed if site.kind == "Linear" and site.rules]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("net", NETS)
def test_channels_last(net: str, tail: str) -> None:
    """All layers, each one of them, or the input."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6)
    count = len(NETS[net]())
    for which in (*range(count), "all", "input"):
        model = Net(NETS[net](), TAILS[tail])
        for i, layer in enumerate(model.layers):
            if which in (i, "all"):
                layer.to(memory_format=LAST)
        given = x.contiguous(memory_format=LAST) if which == "input" else x
        assert "applied" in same(model, given, {"fold": "cached", "merge_kernels": "any"})


def test_three_spatial_dimensions() -> None:
    torch.manual_seed(0)
    for format in (torch.channels_last_3d, torch.contiguous_format):
        layers: list[nn.Module] = [nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1)]
        model = Net(layers, lambda y: y).to(memory_format=format)
        assert same(model, torch.randn(2, 4, 3, 5, 6), {"fold": "cached"}) == ["applied"]


def test_any_order_of_dimensions() -> None:
    """x itself is a term, and its strides are neither of the usual ones."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Identity(), nn.Linear(5, 5), nn.Linear(5, 5)]
    model = Net(layers, lambda y: y.transpose(1, 2).view(2, -1))
    x = torch.randn(2, 5, 8).transpose(1, 2)
    assert same(model, x, {"fold": "cached", "merge_kernels": "any"}) == ["applied"]


@pytest.mark.parametrize("seed", range(12))
def test_drawn(seed: int) -> None:
    """Random sums whose layers, and inputs, are stored either way."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model, x = Drawn(seed), torch.randn(2, 4, 7, 7)
    for module in model.modules():
        if isinstance(module, C) and draw.random() < 0.5:
            module.to(memory_format=LAST)
    if draw.random() < 0.3:
        x = x.contiguous(memory_format=LAST)
    same(model, x, {"fold": "cached", "merge_kernels": "any"})


def _normed(x: Tensor) -> Tensor:
    """A LayerNorm over the channels, written out."""
    x = x - x.mean(1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)


class Channels(nn.Module):
    """A norm over the channels of something that is stored channels last, or of layers in a row that lose this."""

    def __init__(self, case: str, view: bool) -> None:
        super().__init__()
        self.case, self.view = case, view
        self.wide, self.narrow, self.read = C(4, 32, 3, padding=1), C(32, 4, 1), C(4, 4, 1)
        if case == "in a row":
            self.narrow.to(memory_format=LAST)

    def forward(self, x: Tensor) -> Tensor:
        match self.case:
            case "in a row":
                x = self.narrow(self.wide(x))
            case "to":
                x = self.read(x).to(memory_format=LAST)
            case "contiguous":
                x = self.read(x).contiguous(memory_format=LAST)
        y = _normed(x)
        out: Tensor = y.permute(0, 2, 3, 1).view(-1, 4) if self.view else self.read(y)
        return out


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("case", ["in a row", "to", "contiguous"])
def test_norms_over_channels(case: str, view: bool) -> None:
    torch.manual_seed(0)
    same(Channels(case, view), torch.randn(2, 4, 7, 6), {"fold": "cached"})


def test_order_in_memory() -> None:
    assert memory_order(torch.eye(3).to_sparse()) is None
    assert memory_order(torch.ones(2, 3, 4).permute(2, 0, 1)) == (1, 2, 0)
    assert memory_order(torch.ones(3).expand(2, 3)) is None
    assert memory_order(torch.ones(0, 3, 4).transpose(1, 2)) == (0, 1, 2)
