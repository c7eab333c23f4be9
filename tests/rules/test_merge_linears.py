"""Two linear layers with nothing between, in models, and what looks like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equivalence import EagerBackend, assert_low_precision, assert_same_float64, transformed
from rule_test import RuleTest, moved, rows
from torch import Tensor, nn

from normfx.report import Report


def merged(report: Report) -> list[bool]:
    return ["merge_linears" in site.rules for site in report.composed if site.kind == "Linear"]


class Branches(nn.Module):
    """Residual layers whose branches have two linears in a row at their end, or their beginning; a last norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm1, self.norm2, self.last = nn.Linear(5, 8), *(nn.LayerNorm(8) for _ in range(3))
        self.up = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 16))
        self.down = nn.Sequential(nn.Linear(16, 12), nn.Dropout(0.1), nn.Linear(12, 8))
        self.head = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 7), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        x = x + F.gelu(self.up[0](self.norm2(x))) @ self.up[0].weight
        out: Tensor = self.head(self.last(x))
        return out


def _batch() -> Tensor:
    return torch.randn(4, 40, 5, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("options", [None, {"fold": "auto"}, {"rules": "all", "crms_basis": "drop"}])
def test_among_the_other_rules(options: dict[str, str] | None) -> None:
    """The layers take γ and β of the norm before them, and lose the mean of the stream that they write."""
    torch.manual_seed(0)
    report = assert_same_float64(moved(Branches()).eval(), (_batch(),), options)
    assert merged(report) == [True] * 4
    assert all("pre_rms_norm" in site.rules for site in report.sites)


def test_in_training() -> None:
    """Dropout stays between two of them; gradients of both weights come from the product."""
    torch.manual_seed(0)
    report = assert_same_float64(moved(Branches()).train(), (_batch(),), {"fold": "auto"})
    assert merged(report) == [True] * 3


def test_low_precision() -> None:
    torch.manual_seed(0)
    model = moved(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))).eval()
    batches = [(torch.randn(64, 16) + 0.5,) for _ in range(4)]
    backend = EagerBackend({"fold": "cached"})
    assert_low_precision(model, batches, backend, torch.float32)
    assert merged(backend.report) == [True]


class Trap(nn.Module):
    """Two layers that are no pair, by name."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        match case:
            case "padded":
                self.two = nn.Conv2d(8, 4, 1, padding=1)
            case "strided":
                self.two = nn.Conv2d(8, 4, 1, stride=2)
            case "wide":
                self.two = nn.Conv2d(8, 4, 2)
            case "grouped":
                self.two = nn.Conv2d(8, 4, 1, groups=2)
            case "depthwise":
                self.one = nn.Conv2d(3, 6, 3, groups=3)
                self.two = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "no gradient":
            with torch.no_grad():
                between = self.one(x)
            out: Tensor = self.two(between)
            return out
        between = self.one(x)
        if self.case == "written":
            between[0].add_(between[1])
        if self.case == "other axis":
            return F.linear(between, self.two.weight[:, :, 0, 0][:, :5])
        out = self.two(between)
        return out


@pytest.mark.parametrize(
    "case", ["padded", "strided", "wide", "grouped", "depthwise", "no gradient", "written", "other axis"]
)
def test_traps(case: str) -> None:
    torch.manual_seed(0)
    assert not any(merged(assert_same_float64(Trap(case).eval(), (torch.randn(2, 3, 5, 5),))))


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "strided, without bias": lambda: nn.Conv2d(3, 8, 2, stride=2, bias=False),
    "dilated": lambda: nn.Conv2d(3, 8, 2, dilation=2, padding="same", padding_mode="zeros"),
    "pointwise": lambda: nn.Conv2d(3, 8, 1),
}


@pytest.mark.parametrize("first", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(first: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = moved(nn.Sequential(CONVOLUTIONS[first](), nn.Conv2d(8, 2, 1, bias=bias), nn.ReLU())).eval()
    assert merged(assert_same_float64(model, (torch.randn(4, 3, 6, 6),))) == [True]


def test_a_layer_after_itself() -> None:
    """W(Wa + b) + b: the product is a copy, the weight stays one parameter, whose gradient is of both."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    assert merged(assert_same_float64(moved(nn.Sequential(layer, layer)), (rows(40, 6),))) == [True]


class MergeLinears(RuleTest):
    rule = "merge_linears"

    def test_three(self) -> None:
        """The third is compared with the product of the first two."""
        self.check(
            nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 5), nn.Linear(5, 4)),
            """\
linear_1 in 1: applied
linear_2 in 2: applied
args.0: f32[40, 4]
%0 = input_shift(1.weight, 0.bias, bias=1.bias, groups=1): f32[5]
%1 = merge_weights(1.weight, 0.weight): f32[5, 4]
%2 = input_shift(2.weight, %0, bias=2.bias, groups=1): f32[4]
%3 = merge_weights(2.weight, %1): f32[4, 4]
%4 = linear(args.0, %3, %2): f32[40, 4]
return [%4]
""",
            rows(40, 4),
        )

    def test_the_first_two_do_not_gain(self) -> None:
        self.check(
            nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 2)),
            """\
linear_1 in 1: no_gain
linear_2 in 2: applied
args.0: f32[40, 6]
%0 = linear(args.0, 0.weight, 0.bias): f32[40, 2]
%1 = input_shift(2.weight, 1.bias, bias=2.bias, groups=1): f32[2]
%2 = merge_weights(2.weight, 1.weight): f32[2, 2]
%3 = linear(%0, %2, %1): f32[40, 2]
return [%3]
""",
            rows(40, 6),
        )

    def test_convolution(self) -> None:
        self.fold = "cached"
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)).eval()
        self.check(
            model,
            """\
conv2d_1 in 1: applied
args.0: f32[2, 3, 5, 5]
%0 = input_shift(1.weight, 0.bias, bias=1.bias, groups=1): f32[2]
%1 = merge_weights(1.weight, 0.weight): f32[2, 3, 3, 3]
%2 = conv2d(args.0, %1, %0, [1, 1], [1, 1]): f32[2, 2, 5, 5]
return [%2]
""",
            rows(2, 3, 5, 5),
        )


class Pruned(nn.Module):
    """Layers without features between, or without any result."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.wide = nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 8)
        self.none, self.other = nn.Linear(8, 0), nn.Linear(8, 0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up(self.down(x)) + self.wide(x), self.none(x) + self.other(x)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("fold", ["auto", "live"])
def test_no_features(fold: str) -> None:
    model, x = Pruned().requires_grad_(False), rows(3, 8)
    outputs, report = transformed(model, (x,), {"fold": fold})
    assert not any(merged(report))
    torch.testing.assert_close(outputs, model(x))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros like": torch.zeros_like,
    "expanded as": lambda h: torch.ones((), dtype=h.dtype).expand_as(h),
    "number of entries": lambda h: torch.ones((), dtype=h.dtype) * h.numel(),
    "features": lambda h: torch.ones(h.shape[-1], dtype=h.dtype),
    "rows": lambda h: torch.ones(h.shape[0], dtype=h.dtype),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", SHAPES)
def test_what_reads_the_shape_between(case: str, dynamic: bool) -> None:
    first, second = nn.Linear(8, 32), nn.Linear(32, 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(h), SHAPES[case](h)

    model, x = Net().double().requires_grad_(False), rows(5, 8)
    torch._dynamo.reset()
    backend = EagerBackend({"fold": "cached"})
    out = torch.compile(model, backend=backend, dynamic=dynamic)(x.double())
    torch.testing.assert_close(out, model(x.double()))
    assert merged(backend.report) == [case not in ("zeros like", "expanded as")]


@pytest.mark.parametrize("ambient", [False, True])
def test_a_region_without_autocast(ambient: bool) -> None:
    """The caller's autocast does not hold in it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.other = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.second(self.first(x)) + self.other(x)

    model, x = Net().requires_grad_(False), rows(5, 8).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        out, report = transformed(model, (x,), {"fold": "cached", "merge_kernels": "any"})
        torch.testing.assert_close(out, model(x))
    assert out.dtype == torch.float32 and any(site.rules for site in report.composed)
