"""What fold_batch_norm must not get wrong: shapes of vectors, means far from 0, memory that others write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_nets import moved
from equivalence import EagerBackend, assert_low_precision, transformed
from torch import Tensor, nn

C = 6


class Given(nn.Module):
    """A writer, and a BatchNorm by its function with vectors as they are given."""

    def __init__(self, writer: nn.Module, **vectors: Tensor | None) -> None:
        super().__init__()
        self.writer = writer
        torch.manual_seed(0)
        plain = {"mean": torch.randn(C), "var": torch.rand(C) + 0.5, "weight": torch.randn(C), "bias": torch.randn(C)}
        for name, vector in {**plain, **vectors}.items():
            self.register_buffer(name, vector)

    def forward(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        return F.batch_norm(self.writer(x), self.mean if mean is None else mean, self.var, self.weight, self.bias)


WRITERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear of as many rows as channels": (lambda: nn.Linear(4, C), (C, 4)),
    "convolution": (lambda: nn.Conv2d(4, C, 3, bias=False), (2, 4, 6, 6)),
    "transposed, in groups": (lambda: nn.ConvTranspose2d(4, C, 3, groups=2), (2, 4, 5, 5)),
}

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "(C, 1)": lambda v: v.reshape(C, 1),
    "(1, C, 1, 1)": lambda v: v.reshape(1, C, 1, 1),
    "one number, expanded": lambda v: v[:1].expand(C),
    "every second entry": lambda v: torch.stack([v, v + 1], 1)[:, 0],
}


def _folded(report: Any) -> list[bool]:
    return ["fold_batch_norm" in site.rules for site in report.sites if site.kind == "BatchNorm"]


def _same(model: nn.Module, *inputs: Tensor, rules: str = "default", tolerance: float = 1e-12) -> Any:
    """The report, after a comparison with eager in float64, with kept folds."""
    model, given = model.double().eval(), tuple(x.double() for x in inputs)
    with torch.no_grad():
        want = copy.deepcopy(model)(*given)
        got, report = transformed(model, given, {"fold": "cached", "rules": rules})
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return report


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("writer", WRITERS)
def test_vectors_that_are_rows(writer: str, rows: str) -> None:
    """γ and β that torch reads as a row of numbers. (Statistics of more than one dimension it does not take.)"""
    build, shape = WRITERS[writer]
    torch.manual_seed(1)
    for names in (("weight",), ("bias",), ("weight", "bias")):
        model = Given(build(), **{name: ROWS[rows](torch.randn(C)) for name in names})
        assert _folded(_same(model, torch.randn(shape))) == [True]


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_vector_alone(missing: str) -> None:
    assert _folded(_same(Given(nn.Conv2d(4, C, 3), **{missing: None}), torch.randn(2, 4, 6, 6))) == [True]


def test_vectors_of_two_dimensions_stay() -> None:
    """Which channel has which entry would be a guess about how torch reads them."""
    report = _same(Given(nn.Linear(4, C), bias=torch.randn(2, 3)), torch.randn(5, 4))
    assert [r.code for r in report.sites[0].refusals if r.rule == "fold_batch_norm"] == ["vectors"]


def test_statistics_that_are_inputs_stay() -> None:
    report = _same(Given(nn.Linear(4, C)), torch.randn(5, 4), torch.randn(C))
    assert [r.code for r in report.sites[0].refusals if r.rule == "fold_batch_norm"] == ["computed"]


def test_weights_in_half_precision_stay() -> None:
    """A bfloat16 convolution, statistics in float32."""
    model = Given(nn.Conv2d(4, C, 3).bfloat16()).eval()
    x = torch.randn(2, 4, 6, 6).bfloat16()
    with torch.no_grad():
        want = model(x)
        got, report = transformed(model, (x,), {"fold": "cached"})
    assert _folded(report) == [False] and torch.equal(got, want)


@pytest.mark.parametrize("place", ["reads the input", "reads a linear"])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_a_mean_far_from_zero(place: str, mean: float) -> None:
    """The error against float64 next to eager's: features like years, with which W·s·x and W·s·mean cancel."""
    torch.manual_seed(0)
    batch = torch.randn(256, 64) + mean
    first = [nn.Linear(64, 64)] if place == "reads a linear" else []
    model = nn.Sequential(*first, nn.BatchNorm1d(64), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        read = first[0](batch) if first else batch
        norm: Any = model[len(first)]
        norm.running_mean.copy_(read.mean(0))
        norm.running_var.copy_(read.var(0))
    backend = EagerBackend({"fold": "cached"})
    assert_low_precision(model, [(batch,)], backend, torch.float32)
    assert _folded(backend.report) == [bool(first)]


class _Shared(nn.Module):
    """A BatchNorm in training writes the statistics that another in eval reads, through memory that they share."""

    def __init__(self, how: str, first: str) -> None:
        super().__init__()
        self.write, self.norm, self.trained = nn.Conv2d(4, C, 1), nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        memory = torch.ones(2, C, dtype=torch.float64)
        self.norm.running_mean, self.norm.running_var = memory[0], memory[1]
        flat = memory.data.view(-1) if how == "data" else memory.view(-1)
        self.trained.running_mean, self.trained.running_var = flat[:C], flat[C:]
        if how == "one buffer":
            self.trained.running_mean, self.trained.running_var = memory[0], memory[1]
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        written = self.write(x)
        if self.first == "in another graph":
            torch._dynamo.graph_break()
        if self.first == "after":
            out: Tensor = self.norm(written)
            self.trained(x.repeat(1, 2, 1, 1)[:, :C] * 2)
            return out
        self.trained(written.detach() * 2)
        if self.first == "in another graph":
            torch._dynamo.graph_break()
            written = self.write(x)
        read: Tensor = self.norm(written)
        return read


@pytest.mark.parametrize("first", ["before", "after", "in another graph"])
@pytest.mark.parametrize("how", ["view", "data", "one buffer"])
def test_statistics_written_through_other_memory(how: str, first: str) -> None:
    """Outputs and statistics are eager's. (So are those of aot_eager, but that it takes no views through .data.)"""

    def calls(backend: Any) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = _Shared(how, first).double().eval()
        model.trained.train()
        compiled, x = torch.compile(model, backend=backend), torch.randn(2, 4, 6, 6, dtype=torch.float64)
        with torch.no_grad():
            return [*(compiled(x) for _ in range(3)), *(b.clone() for b in model.buffers())]

    want = calls("eager")
    torch.testing.assert_close(calls(EagerBackend({"fold": "cached"})), want, rtol=1e-12, atol=1e-12)
    assert not torch.equal(want[0], want[1])


class _Observer(nn.Module):
    """A BatchNorm in training whose output is not used, next to norms that a rule changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.seen = nn.Linear(4, C), nn.BatchNorm1d(C)
        self.norm = nn.LayerNorm(C) if kind == "LayerNorm" else nn.BatchNorm1d(C)
        self.last = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen(x.repeat(1, 2)[:, :C])
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm"])
def test_an_unused_norm_in_training_counts_on(kind: str) -> None:
    """Its statistics are written, which its op's schema does not say; whatever the rule."""
    torch.manual_seed(0)
    model = _Observer(kind).double().eval()
    model.seen.train()
    twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64) + 1
    with torch.no_grad():
        got, report = transformed(model, (x,), {"fold": "cached"})
        torch.testing.assert_close(got, twin(x))
    assert any(site.rules for site in report.sites)
    assert twin.seen.running_mean is not None and twin.seen.running_mean.any()
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


class _Stream(nn.Module):
    """A BatchNorm before a product that is added into a stream, and a norm of which crms_norm could make a CRMSNorm."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.skip, self.norm, self.last, self.head = (
            nn.Linear(4, C),
            nn.BatchNorm1d(4),
            nn.LayerNorm(C),
            nn.Linear(C, 3),
        )
        self.weight, self.bias = nn.Parameter(torch.randn(4, C)), nn.Parameter(torch.randn(C))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(torch.tanh(x))
        y = torch.addmm(self.bias, z, self.weight) if self.product == "addmm" else z @ self.weight
        out: Tensor = self.head(self.last(self.skip(x) + y))
        return out


@pytest.mark.parametrize("product", ["matmul", "addmm"])
def test_next_to_crms_norm(product: str) -> None:
    torch.manual_seed(0)
    report = _same(moved(_Stream(product)), torch.randn(5, 4), rules="default,+crms_norm")
    assert any("crms_norm" in site.rules for site in report.sites)
