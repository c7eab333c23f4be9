"""Norms whose γ and β are ops after them, in whole blocks: `ln(x) * (gamma + 1)`, `F.normalize(x) * scale * (gamma + 1)`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_low_precision, assert_same_float64
from rule_test import moved
from torch import Tensor, nn

WIDTH = 8


class OffsetLayerNorm(nn.Module):
    """nn.LayerNorm without affine, times γ + 1, plus β where there is one."""

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.gamma = nn.Parameter(torch.zeros(WIDTH))
        self.beta = nn.Parameter(torch.zeros(WIDTH)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ln(x) * (self.gamma + 1.0)
        return out if self.beta is None else out + self.beta


class LengthNorm(nn.Module):
    """x/max(‖x‖, ε) · √d · (γ + 1)"""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * WIDTH**0.5 * (self.gamma + 1.0)


class ClampedScaleNorm(nn.Module):
    """g · x/max(‖x‖, ε)"""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1) * WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.norm(x, dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class ConditionedNorm(nn.Module):
    """A LayerNorm whose weight is computed from its input's mean (adaptive LayerNorm)."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.condition = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ln(x) * (self.condition(x.mean(1, keepdim=True)) + 1.0)
        return out


class Layers(nn.Module):
    """Feed-forward layers with a norm before each or, `post`, after each residual add; and a last norm and head."""

    def __init__(self, norm: type[nn.Module], post: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.post = post
        self.enter, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.norms = nn.ModuleList(norm() for _ in range(depth + 1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = norm(x + layer(x)) if self.post else x + layer(norm(x))
        out: Tensor = self.head(self.norms[-1](x))
        return out


def _rows() -> Tensor:
    return torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)) + 0.5


CASES: dict[str, tuple[type[nn.Module], bool, set[str], set[str]]] = {
    "offset": (OffsetLayerNorm, False, {"pre_rms_norm", "fold_affine"}, {"fuse_residual_norm"}),
    "offset, post": (OffsetLayerNorm, True, set(), {"fuse_residual_norm"}),
    "length": (LengthNorm, False, {"fold_affine"}, {"fuse_residual_norm"}),
    "length, post": (LengthNorm, True, set(), {"fuse_residual_norm", "fold_affine"}),
    "clamped ScaleNorm": (ClampedScaleNorm, False, {"fold_affine"}, {"fuse_residual_norm"}),
    "conditioned": (ConditionedNorm, False, set(), set()),
}
"""The norm, whether it stands after the add, the rules applied to all norms, and those applied to some."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_same_function(case: str, training: bool) -> None:
    kind, post, everywhere, somewhere = CASES[case]
    torch.manual_seed(0)
    model = moved(Layers(kind, post)).train(training)
    report = assert_same_float64(model, (_rows(),))
    sites = [site for site in report.sites if site.kind != "BatchNorm"]
    assert len(sites) == 3
    for site in sites:
        assert everywhere <= set(site.rules), f"{site.name}: {site.rules}"
    assert somewhere <= {rule for site in sites for rule in site.rules}
    if kind is ConditionedNorm:
        assert not any("fold_affine" in site.rules for site in sites)


@pytest.mark.parametrize("kind", [OffsetLayerNorm, LengthNorm])
def test_low_precision(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = moved(Layers(kind)).eval()
    batches = [(torch.randn(4, 16, 5) + 0.5,) for _ in range(8)]
    for dtype in (torch.float32, torch.bfloat16):
        assert_low_precision(model, batches, EagerBackend(), dtype)


def test_rows_of_zeros() -> None:
    """A clamped length keeps rows of zeros 0, with the gradients of the bound."""
    torch.manual_seed(0)
    model = moved(nn.Sequential(LengthNorm(), nn.Linear(WIDTH, 3)))
    x = torch.randn(3, WIDTH)
    x[1] = 0
    report = assert_same_float64(model, (x,))
    assert "fold_affine" in report.sites[0].rules


class Promoted(nn.Module):
    """A norm of a narrow value times a γ of float32: what follows is float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.read = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.rms_norm(x.to(torch.bfloat16), (WIDTH,)) * self.gamma
        z = F.rms_norm(x.to(torch.bfloat16), (WIDTH,), eps=1e-3) * self.gamma.to(torch.bfloat16)
        return y, self.read(y.sin()) + z.float().sum()


def test_dtypes_are_promoted_as_before() -> None:
    torch.manual_seed(0)
    model = Promoted()
    torch._dynamo.reset()
    out = torch.compile(model, backend=EagerBackend({"rules": "all"}), fullgraph=True)(torch.randn(4, WIDTH))
    want = model(torch.randn(4, WIDTH))
    assert [o.dtype for o in out] == [o.dtype for o in want]
