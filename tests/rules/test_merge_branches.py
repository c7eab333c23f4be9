"""Layers that read one value and whose results are added: which are merged, and which look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from branch_nets import Adapted, Drawn, Rows, Written, decided
from equivalence import assert_same_float64, transformed
from rule_test import RuleTest, moved, rows
from torch import Tensor, nn

from normfx.rules.fold_batch_norm import moved as moved_norm

ALL = {"fold": "cached", "merge_kernels": "any"}


def run(model: nn.Module, *inputs: Tensor, options: dict[str, str] | None = None) -> list[str]:
    """What is decided of a model without gradients, after a comparison in float64."""
    model = moved(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            moved_norm(module)
    return decided(assert_same_float64(model, inputs, options or ALL))


class Sum(nn.Module):
    """A function of some layers and a value."""

    def __init__(self, body: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.body, self.layers = body, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.body(x, *self.layers)


def _added(x: Tensor, first: nn.Module, *others: nn.Module) -> Tensor:
    total: Tensor = first(x)
    for other in others:
        total = total + other(x)
    return torch.relu(total)


IMAGE = rows(2, 4, 7, 7)
C = nn.Conv2d

KERNELS: dict[str, tuple[Tensor, tuple[Callable[[], nn.Module], ...], str]] = {
    "equal": (IMAGE, (lambda: C(4, 6, 3), lambda: C(4, 6, 3, bias=False)), "applied"),
    "1 in 3": (IMAGE, (lambda: C(4, 6, 1), lambda: C(4, 6, 3, padding=1)), "applied"),
    "3 in 5, strides": (
        IMAGE,
        (lambda: C(4, 6, 5, 2, padding=2, bias=False), lambda: C(4, 6, 3, 2, padding=1, bias=False)),
        "applied",
    ),
    "1 in 3, dilated": (IMAGE, (lambda: C(4, 6, 3, padding=2, dilation=2), lambda: C(4, 6, 1)), "applied"),
    "same": (IMAGE, (lambda: C(4, 6, 4, padding="same"), lambda: C(4, 6, 3, padding="same")), "applied"),
    "same and 1": (IMAGE, (lambda: C(4, 6, 2, padding="same"), lambda: C(4, 6, 1, padding="valid")), "applied"),
    "a corner": (IMAGE, (lambda: C(4, 6, 4, padding=2), lambda: C(4, 6, 2, padding=1)), "applied"),
    "rows and columns": (
        IMAGE,
        (
            lambda: C(4, 6, 3, padding=1),
            lambda: C(4, 6, (1, 3), padding=(0, 1)),
            lambda: C(4, 6, (3, 1), padding=(1, 0)),
        ),
        "applied",
    ),
    "depthwise": (IMAGE, (lambda: C(4, 8, 3, padding=1, groups=4), lambda: C(4, 8, 1, groups=4)), "applied"),
    "groups": (IMAGE, (lambda: C(4, 6, 3, groups=2), lambda: C(4, 6, 3, groups=2)), "applied"),
    "one dimension": (rows(2, 4, 9), (lambda: nn.Conv1d(4, 4, 3, padding=1), lambda: nn.Conv1d(4, 4, 1)), "applied"),
    "three dimensions": (
        rows(2, 4, 3, 4, 3),
        (lambda: nn.Conv3d(4, 4, 3, padding=1), lambda: nn.Conv3d(4, 4, 1)),
        "applied",
    ),
    "itself": (IMAGE, (lambda: C(4, 4, 3, padding=1), nn.Identity), "applied"),
    "a BatchNorm": (IMAGE, (lambda: C(4, 4, 3, padding=1), lambda: nn.BatchNorm2d(4)), "applied"),
    "a BatchNorm, groups": (IMAGE, (lambda: C(4, 4, 3, padding=1, groups=2), lambda: nn.BatchNorm2d(4)), "applied"),
    "a BatchNorm of rows": (rows(5, 4), (lambda: nn.Linear(4, 4), lambda: nn.BatchNorm1d(4)), "applied"),
    "a BatchNorm of tokens": (rows(5, 4, 4), (lambda: nn.Linear(4, 4), lambda: nn.BatchNorm1d(4)), "geometry"),
    "a strided one and itself": (rows(2, 4, 1, 1), (lambda: C(4, 4, 3, 2, padding=1), nn.Identity), "geometry"),
    "other dilations": (IMAGE, (lambda: C(4, 6, 3, padding=1), lambda: C(4, 6, 3, padding=2, dilation=2)), "geometry"),
    "other groups": (IMAGE, (lambda: C(4, 6, 3), lambda: C(4, 6, 3, groups=2)), "geometry"),
    "other strides": (rows(2, 4, 1, 1), (lambda: C(4, 6, 3, padding=1), lambda: C(4, 6, 3, 2, padding=1)), "geometry"),
    "between entries": (IMAGE, (lambda: C(4, 6, 2, dilation=2, padding=1), lambda: C(4, 6, 1)), "geometry"),
    "outside": (IMAGE, (lambda: C(4, 6, 4, 7), lambda: C(4, 6, 3, 7, padding=1)), "geometry"),
    "rows alone": (
        IMAGE,
        (lambda: C(4, 6, (1, 3), padding=(0, 1)), lambda: C(4, 6, (3, 1), padding=(1, 0))),
        "geometry",
    ),
}
"""An input, layers, and what is decided of their sum."""


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name: str) -> None:
    x, layers, expected = KERNELS[name]
    torch.manual_seed(0)
    assert run(Sum(_added, *(build() for build in layers)), x) == [expected]


def test_a_kernel_that_does_not_fit_stays() -> None:
    """The other two are one."""
    torch.manual_seed(0)
    layers = (C(4, 4, 3, padding=1), C(4, 4, 3, padding=2, dilation=2), C(4, 4, 3, padding=1))
    assert run(Sum(_added, *layers), IMAGE) == ["applied"]


SUMS: dict[str, Callable[..., Tensor]] = {
    "a difference": lambda x, a, b: a(x) - b(x),
    "the other way round": lambda x, a, b: 0.3 * b(x) - 2.0 * a(x) / 3.0,
    "alpha": lambda x, a, b: torch.sub(a(x), b(x), alpha=2),
    "a negative sum": lambda x, a, b: -(torch.add(b(x), a(x), alpha=0.5) * 4),
    "nothing": lambda x, a, b: 0 + a(x) + (b(x) + 0),
    "something else between": lambda x, a, b: (torch.sub(b(x), torch.tanh(x), alpha=3) + torch.sin(x)) - a(x),
    "something else, each": lambda x, a, b: (torch.tanh(x) - 2 * b(x)) * 0.5 - (torch.sin(x) - a(x)),
    "in place": lambda x, a, b: a(x).mul_(2.0).add_(b(x)),
    "three": lambda x, a, b: a(x) + b(x) + a(x),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    """Numbers, signs, and terms of other values around and between."""
    torch.manual_seed(0)
    body: Callable[..., Tensor] = lambda x, a, b: torch.relu(SUMS[name](x, a, b))  # noqa: E731
    assert run(Sum(body, nn.Linear(6, 6), nn.Linear(6, 6)), rows(3, 5, 6)) == ["applied"]


def _written(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = torch.sin(x)
    first = a(y)
    y[0].add_(y[1])
    total: Tensor = first + b(y)
    return total


def _cast(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    total: Tensor = a(x) + b(x).to(torch.float32).to(x.dtype)
    return total


def _shared(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    low = b(x)
    return torch.relu(a(x) + low) * low


NONE: dict[str, Callable[..., Tensor]] = {
    "two values": lambda x, a, b: a(x) + b(torch.tanh(x)),
    "padded by itself": lambda x, a, b: a(F.pad(x, (0, 0))) + b(x),
    "views": lambda x, a, b: a(x) + b(x).transpose(0, 1).reshape(5, 3, 6).transpose(0, 1).roll(1, 0),
    "a product": lambda x, a, b: a(x) * b(x),
    "random": lambda x, a, b: a(x) + F.dropout(b(x), 0.5, True) * 0,
    "broadcast": lambda x, a, b: a(x) + b(x).mean(0, keepdim=True),
    "a gate": lambda x, a, b: a(x) + torch.sigmoid(b(x)),
    "cast": _cast,
    "a value that is written between": _written,
}


@pytest.mark.parametrize("name", NONE)
def test_what_looks_like_it(name: str) -> None:
    torch.manual_seed(0)
    assert run(Sum(NONE[name], nn.Linear(6, 6), nn.Linear(6, 6)), rows(3, 5, 6)) in ([], ["mutated"])


def test_read_elsewhere() -> None:
    torch.manual_seed(0)
    assert run(Sum(_shared, nn.Linear(6, 6), nn.Linear(6, 6)), rows(3, 6)) == ["read_elsewhere"]


def test_a_sum_that_is_read_elsewhere_is_merged_by_itself() -> None:
    def body(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        part = a(x) + b(x)
        return torch.relu(part + c(x)) * part

    torch.manual_seed(0)
    assert run(Sum(body, *(nn.Linear(6, 6) for _ in range(3))), rows(3, 6)) == ["applied"]


def test_one_weight_twice() -> None:
    """W(x) + W(x) are two calls of one weight; a third layer holds a view of it."""

    def body(x: Tensor, a: nn.Linear, b: nn.Linear) -> Tensor:
        return torch.relu(a(x) + F.linear(x, a.weight.flip(0)) - b(x))

    torch.manual_seed(0)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    assert run(Sum(body, first, second), rows(3, 6)) == ["applied"]


@pytest.mark.parametrize(("kernels", "expected"), [("equal", "rounding"), ("padded", "applied"), ("any", "applied")])
def test_smaller_kernels_are_asked_for(kernels: str, expected: str) -> None:
    torch.manual_seed(0)
    layers = (C(4, 4, 3, padding=1), C(4, 4, 1))
    assert run(Sum(_added, *layers), IMAGE, options={"fold": "cached", "merge_kernels": kernels}) == [expected]


@pytest.mark.parametrize(("kernels", "expected"), [("equal", "rounding"), ("padded", "rounding"), ("any", "applied")])
def test_the_value_itself_is_asked_for(kernels: str, expected: str) -> None:
    torch.manual_seed(0)
    layers = (C(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert run(Sum(_added, *layers), IMAGE, options={"fold": "cached", "merge_kernels": kernels}) == [expected]


class MergeBranches(RuleTest):
    rule = "merge_branches"
    fold = "cached"

    def test_three(self) -> None:
        body: Callable[..., Tensor] = lambda x, a, b, c: torch.relu(a(x) - 2 * b(x) + c(x))  # noqa: E731
        self.check(
            Sum(body, *(nn.Linear(4, 3, bias=i > 0) for i in range(3))).requires_grad_(False),
            """\
add: applied
x: f32[3, 4]
%0 = merge_kernels(weights=[layers.0.weight, layers.1.weight, layers.2.weight], factors=[1, -2, 1]): f32[3, 4]
%1 = merge_shifts(shifts=[layers.1.bias, layers.2.bias], factors=[-2, 1]): f32[3]
%2 = linear(x, %0, %1): f32[3, 3]
%3 = relu(%2): f32[3, 3]
return [%3]
""",
        )

    def test_convolutions(self) -> None:
        layers = (C(4, 4, 3, padding=1), C(4, 4, 3, padding=1))
        self.check(
            Sum(_added, *layers).requires_grad_(False),
            """\
add: applied
x: f32[2, 4, 5, 5]
%0 = merge_kernels(weights=[layers.0.weight, layers.1.weight], factors=[1, 1], offsets=[0, 0, 0, 0]): f32[4, 4, 3, 3]
%1 = merge_shifts(shifts=[layers.0.bias, layers.1.bias], factors=[1, 1]): f32[4]
%2 = conv2d(x, %0, %1, [1, 1], [1, 1]): f32[2, 4, 5, 5]
%3 = relu(%2): f32[2, 4, 5, 5]
return [%3]
""",
            rows(2, 4, 5, 5),
        )

    def test_adapter_of_rows(self) -> None:
        self.check(
            Adapted(Rows(4, 3), 4, 3).requires_grad_(False),
            """\
linear_1 in up: no site
add: applied
x: f32[2, 3, 4]
%0 = view(x, [-1, 4]): f32[6, 4]
%1 = merge_weights(up.weight, down.weight): f32[3, 4]
%2 = t(%1): f32[4, 3]
%3 = merge_kernels(weights=[wide.weight, %2], factors=[1, 1.5]): f32[4, 3]
%4 = merge_shifts(shifts=[wide.bias, up.bias], factors=[1, 1.5]): f32[3]
%5 = addmm(%4, %0, %3): f32[6, 3]
%6 = view(%5, [2, 3, -1]): f32[2, 3, 3]
return [%6]
""",
            rows(2, 3, 4),
        )


SEEDS = (*range(12), 53)
"""The seeds that run by default. The sum of seed 53 is a difference both terms of which are merged."""


@pytest.mark.parametrize(
    "seed", [*SEEDS, *(pytest.param(s, marks=pytest.mark.slow) for s in range(12, 200) if s != 53)]
)
def test_drawn(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).requires_grad_(False)
    assert_same_float64(model, (rows(2, 4, 6, 6),), {**ALL, "merge_kernels": "any" if seed % 3 else "equal"})


def test_half_of_the_drawn_sums_are_merged() -> None:
    """So that the comparison above compares something."""
    said: list[str] = []
    for seed in range(12):
        said += decided(transformed(Drawn(seed).requires_grad_(False), (rows(2, 4, 6, 6),), ALL)[1])
    assert said.count("applied") >= 4, said


@pytest.mark.parametrize("factors", [(1e-39, 1.0), (1e-20, 1e20), (1.0, 3e7), (1e25, 1e-25)])
def test_numbers_far_from_one_stay(factors: tuple[float, float]) -> None:
    """A quotient of two of them would overflow or vanish in the merged weight."""
    first, second = factors
    for layers in (nn.Linear(8, 8), nn.Linear(8, 8)), (nn.Linear(8, 8, bias=False), nn.Linear(8, 8)):
        model = Sum(lambda x, a, b: torch.tanh(a(x) * first + b(x) / (1 / second)), *layers).requires_grad_(False)
        nn.init.zeros_(layers[0].weight)
        outputs, report = transformed(model, (torch.randn(3, 8),), ALL)
        assert decided(report) == [] and outputs.isfinite().all()


def test_chains_of_numbers() -> None:
    """Each of them is ordinary; what the term has in all may not be."""
    model = Sum(lambda x, a, b: torch.relu(((a(x) * 1e-5) * 1e-5 * 1e-5) + b(x)), nn.Linear(8, 8), nn.Linear(8, 8))
    assert run(model, rows(3, 8)) == []


@pytest.mark.parametrize("written", [False, True])
def test_another_term_that_is_written(written: bool) -> None:
    """A sum that loses a term is read as its other term, which holds something else once it is written."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            total = self.first(x) + z
            if written:
                z.add_(1.0)
            return torch.relu(self.second(x) + total)

    model, x, z = Net().double().requires_grad_(False), rows(3, 8).double(), rows(3, 8).double()
    out, report = transformed(model, (x, z.clone()), ALL)
    torch.testing.assert_close(out, model(x, z.clone()))
    assert decided(report) == ["mutated" if written else "applied"]


@pytest.mark.parametrize("first", [0, 12, 24])
def test_drawn_sums_with_writes(first: int) -> None:
    """Some are merged, and some refused since another term is written."""
    said: set[str] = set()
    for seed in range(first, first + 12):
        model, x, z = Written(seed).double().requires_grad_(False), rows(2, 4, 5, 5).double(), rows(2, 4, 5, 5).double()
        given, written = z.clone(), z.clone()
        found, report = transformed(model, (x, given), ALL)
        torch.testing.assert_close((found, given), (model(x, written), written), rtol=1e-11, atol=1e-11)
        said.update(code for codes in decided(report) for code in codes.split(", "))
    assert said >= {"applied", "mutated"}
