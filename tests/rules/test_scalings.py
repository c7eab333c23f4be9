"""γ and β of layers that normalise nothing, or not as a LayerNorm or RMSNorm does: DyT, PowerNorm, SimpleNorm, ResMLP."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_low_precision, assert_same_float64, transformed
from rule_test import RuleTest, moved, rows
from torch import Tensor, nn

WIDTH = 8


class DynamicTanh(nn.Module):
    """tanh(αx)·γ + β (DyT); with `root` x/sqrt(x² + c)·γ + β (DyISRU). α and c are numbers."""

    def __init__(self, width: int = WIDTH, root: bool = False) -> None:
        super().__init__()
        self.root = root
        self.alpha = nn.Parameter(torch.full((1,), 2.0 if root else 0.5))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        z = x / torch.sqrt(x.pow(2) + self.alpha) if self.root else torch.tanh(self.alpha * x)
        return z * self.weight + self.bias


class ScaledByVariance(nn.Module):
    """x/sqrt(var(x) + ε)·γ (timm's SimpleNorm): the mean is subtracted in the variance alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.var(x, dim=-1, keepdim=True) + 1e-6) * self.weight


class RunningScale(nn.Module):
    """x/sqrt(φ + ε)·γ + β with running φ (Unified Normalization); with groups, of x/sqrt(mean(x²) + ε) (PowerNorm, Shen
    et al. 2020). In training φ is of the batch."""

    phi: Tensor

    def __init__(self, groups: int = 0) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("phi", torch.linspace(0.5, 2.0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups:
            parts = x.contiguous().reshape(*x.shape[:-1], self.groups, WIDTH // self.groups)
            squares = (parts * parts).mean(dim=3, keepdim=True)
            repeated = torch.repeat_interleave(squares, repeats=WIDTH // self.groups, dim=-1)
            x = x / torch.sqrt(repeated.contiguous().reshape(x.shape) + 1e-5)
        columns = x.permute(0, 2, 1).contiguous().unsqueeze(-1)
        phi = (columns * columns).mean((0, 2, 3), keepdim=True) if self.training else self.phi.view(1, WIDTH, 1, 1)
        columns = columns / (phi + 1e-5).sqrt()
        columns = self.weight.view(1, WIDTH, 1, 1) * columns + self.bias.view(1, WIDTH, 1, 1)
        return columns.squeeze(-1).permute(0, 2, 1).contiguous()


class Shifted(nn.Module):
    """γ ⊙ x + β (ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Layers(nn.Module):
    """A residual layer with such a layer before it, and a last one before the head."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.enter, self.up, self.down, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 12), (12, 8), (8, 3)))
        self.norm1, self.norm2 = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        out: Tensor = self.head(self.norm2(x))
        return out


KINDS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "DyT": (DynamicTanh, "", ""),
    "DyISRU": (lambda: DynamicTanh(root=True), "", ""),
    "SimpleNorm": (ScaledByVariance, "", ""),
    "Unified Normalization": (RunningScale, "unbounded_shift", "unbounded_shift"),
    "PowerNorm": (lambda: RunningScale(1), "", "unbounded_shift"),
    "PowerNorm in groups": (lambda: RunningScale(4), "", "unbounded_shift"),
    "ResMLP": (Shifted, "unbounded_shift", "unbounded_shift"),
}
"""What fold_affine refuses in eval and in training ("" where it is applied)."""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_listed(kind: str, training: bool) -> None:
    """As a site of a kind of its own, that no rule for norms takes; outputs and gradients as before."""
    build, *codes = KINDS[kind]
    torch.manual_seed(0)
    report = assert_same_float64(moved(Layers(build)).train(training), (torch.randn(2, 4, 5) + 0.5,))
    assert [(site.name, site.kind) for site in report.sites] == [("norm1", "Affine"), ("norm2", "Affine")]
    for site in report.sites:
        assert [r.code for r in site.refusals] == [code for code in (codes[training],) if code]
        assert site.rules == (() if codes[training] else ("fold_affine",))


@pytest.mark.parametrize("kind", ["DyT", "DyISRU", "PowerNorm"])
def test_low_precision(kind: str) -> None:
    torch.manual_seed(0)
    model = moved(Layers(KINDS[kind][0])).eval()
    batches = [(torch.randn(4, 16, 5) + 0.5,) for _ in range(8)]
    for dtype in (torch.float32, torch.bfloat16):
        assert_low_precision(model, batches, EagerBackend(), dtype)


def test_layers_of_timm() -> None:
    timm = pytest.importorskip("timm.layers")
    for norm in (timm.SimpleNorm, timm.SimpleNormFp32):
        torch.manual_seed(0)
        report = assert_same_float64(
            moved(Layers(lambda norm=norm: norm(WIDTH))), (torch.randn(2, 4, 5),), promoted=True
        )
        assert [(s.kind, s.rules) for s in report.sites] == [("Affine", ("fold_affine",))] * 2
    for name, kind in (("SimpleNorm2d", "Affine"), ("RmsNorm2d", "RMSNorm"), ("LayerNorm2d", "LayerNorm")):
        torch.manual_seed(0)
        model = moved(nn.Sequential(nn.Conv2d(3, WIDTH, 1), getattr(timm, name)(WIDTH), nn.Conv2d(WIDTH, 4, 2)))
        report = assert_same_float64(model, (torch.randn(2, 3, 5, 5),))
        assert [(s.kind, "fold_affine" in s.rules) for s in report.sites] == [(kind, True)], name


class Chain(nn.Module):
    """Random steps along one axis of a value, then readers that are random, too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.steps = [(draw.randrange(4), draw.randrange(6 if draw.random() < 0.8 else 8)) for _ in range(4)]
        self.axis, self.unbounded, self.turned, self.twice, self.tapped = (
            draw.random() < p for p in (0.8, 0.3, 0.3, 0.5, 0.2)
        )
        self.read, self.other = nn.Linear(6, 4), nn.Linear(6, 3, bias=False)
        self.vectors = nn.ParameterList(torch.rand(6) + 0.5 for _ in range(4))
        self.number = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.unbounded else torch.tanh(x)
        for vector, (form, step) in zip(self.vectors, self.steps, strict=True):
            v = vector if self.axis else vector.unsqueeze(-1)
            v = (v, v + 1.0, v.unsqueeze(0), self.number)[form]
            match step:
                case 0:
                    y = v * y
                case 1:
                    y = y / v
                case 2:
                    y = y + v
                case 3:
                    y = torch.sub(y, v, alpha=2)
                case 4:
                    y = torch.addcmul(self.number, v, y)
                case 5:
                    y = y * v
                case 6:
                    y = v - y
                case 7:
                    y = y * 2.0
        y = y.transpose(0, 1) if self.turned else y
        out: Tensor = self.read(y).sum(-1)
        out = out + self.other(y).sum(-1) if self.twice else out
        return out + y.sum(-1) if self.tapped else out


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 30), marks=pytest.mark.slow)], ids=["few", "many"])
def test_random_chains(seeds: range) -> None:
    applied = 0
    for seed in seeds:
        torch.manual_seed(seed)
        report = assert_same_float64(Chain(seed), (torch.randn(6, 6, 6),))
        applied += any("fold_affine" in site.rules for site in report.sites)
    assert applied >= len(seeds) // 6


class Views(nn.Module):
    """The scaled value is row-major, what is scaled is not: a view after it needs its layout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.rand(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x, x], -1)[..., :6] * self.weight
        out: Tensor = self.read(wide.view(-1, 6))
        return out + self.read((x[:1].expand(4, -1, -1) * self.weight).view(-1, 6)).mean()


def test_layout() -> None:
    report = assert_same_float64(Views(), (torch.randn(4, 5, 6),))
    assert ["fold_affine" in site.rules for site in report.sites] == [True, True]


class Traps(nn.Module):
    """Look-alikes, by name."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.gain, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(6))
        self.read, self.twice = nn.Linear(6, 4), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = torch.tanh(x)
        match self.case:
            case "tokens":
                return self.read(z * self.gain[:, None] + self.shift[:, None])
            case "data":
                return self.read(z * (self.gain * x.mean()) + self.shift)
            case "inner value read":
                inner = z * self.gain
                return self.read(inner + self.shift) + inner.sum()
            case "returned":
                y = z * self.gain + self.shift
                return self.read(y), y
            case "no gradient":
                with torch.no_grad():
                    y = z * self.gain + self.shift
                return self.read(y) + z.sum()
            case "two weights":
                return self.read(z * self.gain + self.shift) + self.read(z * self.twice)
            case "two axes":
                return self.read(z * torch.outer(self.gain, self.twice))
            case "written":
                y = z * self.gain + self.shift
                y[0].add_(x[1])
                return self.read(y)
            case _:
                return self.read(F.pad(z * self.gain + self.shift, (0, 0, 1, 1)))


@pytest.mark.parametrize(
    "case",
    ["tokens", "data", "inner value read", "returned", "no gradient", "two weights", "two axes", "written", "padded"],
)
def test_traps(case: str) -> None:
    torch.manual_seed(0)
    report = assert_same_float64(Traps(case), (torch.randn(3, 6, 6),))
    assert not any("fold_affine" in site.rules for site in report.sites if case != "inner value read")


def test_promotion() -> None:
    """A value in bfloat16 times a vector of float32 is float32."""

    class Promoted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.read = nn.Parameter(torch.rand(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.read(torch.tanh(x.to(torch.bfloat16)) * self.gain)
            return out

    torch.manual_seed(0)
    model, x = Promoted(), torch.randn(4, 6)
    out, report = transformed(model, (x,))
    assert report.sites[0].rules == ("fold_affine",)
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)


class Scalings(RuleTest):
    rule = "fold_affine"

    def test_dynamic_tanh(self) -> None:
        self.check(
            nn.Sequential(DynamicTanh(4), nn.Linear(4, 3)),
            """\
0: applied
args.0: f32[3, 4]
%0 = mul(0.alpha, args.0): f32[3, 4]
%1 = tanh(%0): f32[3, 4]
%2 = fold_shift(1.weight, 0.bias, bias=1.bias, dim=1): f32[3]
%3 = scale_features(1.weight, 0.weight, dim=1): f32[3, 4]
%4 = linear(%1, %3, %2): f32[3, 3]
return [%4]
""",
        )

    def test_three_vectors(self) -> None:
        """A running scale, γ and β: the kept weight is W·(γ/σ)."""
        self.fold = "cached"
        model = nn.Sequential(RunningScale(1), nn.Linear(WIDTH, 3)).eval()
        self.check(
            model,
            """\
0: applied
sqrt_1 in 0: no site
args.0: f32[2, 3, 8]
%0 = reshape(args.0, [2, 3, 1, 8]): f32[2, 3, 1, 8]
%1 = mul(%0, %0): f32[2, 3, 1, 8]
%2 = mean(%1, [3], True): f32[2, 3, 1, 1]
%3 = repeat_interleave(%2, 8, -1): f32[2, 3, 1, 8]
%4 = reshape(%3, [2, 3, 8]): f32[2, 3, 8]
%5 = add(%4, 1e-05): f32[2, 3, 8]
%6 = sqrt(%5): f32[2, 3, 8]
%7 = div(args.0, %6): f32[2, 3, 8]
%8 = permute(%7, [0, 2, 1]): f32[2, 8, 3]
%9 = contiguous(%8): f32[2, 8, 3]
%10 = unsqueeze(%9, -1): f32[2, 8, 3, 1]
%11 = view(0.phi, [1, 8, 1, 1]): f32[1, 8, 1, 1]
%12 = add(%11, 1e-05): f32[1, 8, 1, 1]
%13 = sqrt(%12): f32[1, 8, 1, 1]
%14 = view(0.weight, [1, 8, 1, 1]): f32[1, 8, 1, 1]
%15 = view(0.bias, [1, 8, 1, 1]): f32[1, 8, 1, 1]
%16 = squeeze(%10, -1): f32[2, 8, 3]
%17 = permute(%16, [0, 2, 1]): f32[2, 3, 8]
%18 = contiguous(%17): f32[2, 3, 8]
%19 = reciprocal(%13): f32[1, 8, 1, 1]
%20 = mul(%19, %14): f32[1, 8, 1, 1]
%21 = fold_shift(1.weight, %15, bias=1.bias, dim=1): f32[3]
%22 = scale_features(1.weight, %20, dim=1): f32[3, 8]
%23 = linear(%18, %22, %21): f32[2, 3, 3]
return [%23]
""",
            rows(2, 3, WIDTH),
        )

    def test_channels(self) -> None:
        class Channels(DynamicTanh):
            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(self.alpha * x) * self.weight[:, None, None] + self.bias[:, None, None]

        self.check(
            nn.Sequential(Channels(4), nn.Conv2d(4, 3, 2)),
            """\
0: applied
args.0: f32[2, 4, 5, 5]
%0 = mul(0.alpha, args.0): f32[2, 4, 5, 5]
%1 = tanh(%0): f32[2, 4, 5, 5]
%2 = unsqueeze(0.weight, 1): f32[4, 1]
%3 = unsqueeze(%2, 2): f32[4, 1, 1]
%4 = unsqueeze(0.bias, 1): f32[4, 1]
%5 = unsqueeze(%4, 2): f32[4, 1, 1]
%6 = input_shift(1.weight, %5, bias=1.bias, groups=1): f32[3]
%7 = scale_channels(1.weight, %3, dim=1, groups=1): f32[3, 4, 2, 2]
%8 = conv2d(%1, %7, %6): f32[2, 3, 4, 4]
return [%8]
""",
            rows(2, 4, 5, 5),
        )
