"""Weights in the forms that are published: each is folded into, or the reason why not is true. Block: a norm read by one
such layer, another one that writes into the stream, and a norm. Outputs and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_float64
from rule_test import moved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normfx
from normfx.report import Report

WIDTH, HIDDEN = 8, 16
IDS = torch.arange(8).reshape(2, 4)


class Block(nn.Module):
    def __init__(self, read: nn.Module, write: nn.Module) -> None:
        super().__init__()
        self.table, self.norm, self.read, self.write = nn.Embedding(10, WIDTH), nn.LayerNorm(WIDTH), read, write
        self.final, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        return self.head(self.final(x + self.write(F.gelu(self.read(self.norm(x))))))


class Layer(nn.Module):
    """A linear layer computed by `form` from a weight, factors u and v, sparse values at places, and a mask."""

    mask: Tensor
    places: Tensor

    def __init__(self, form: Callable[[Layer, Tensor], Tensor], features: int, out: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.form = form
        self.weight, self.bias = nn.Parameter(torch.randn(out, features, generator=draw)), nn.Parameter(torch.ones(out))
        self.u, self.v = nn.Parameter(torch.ones(out, 3)), nn.Parameter(torch.ones(3, features))
        self.values = nn.Parameter(torch.ones(20))
        self.register_buffer("mask", torch.rand(out, features, generator=draw) > 0.5)
        self.register_buffer("places", torch.randperm(out * features, generator=draw)[:20])

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def straight(w: Tensor, quantised: Tensor) -> Tensor:
    """The quantised weight, with the gradient of w."""
    return w + (quantised - w).detach()


def rounded(w: Tensor) -> Tensor:
    step = w.abs().max() / 127
    return (w / step).round().clamp(-128, 127) * step


def ternary(w: Tensor) -> Tensor:
    step = w.abs().mean().clamp(min=1e-5)
    return (w / step).round().clamp(-1, 1) * step


def blocks(w: Tensor) -> Tensor:
    """NVFP4: blocks of entries with a scale of 8 bits each, entries of the grid of four-bit floats."""
    parts = w.view(w.shape[0], -1, 4)
    step = (parts.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).to(w.dtype)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=w.dtype)
    nearest = ((parts / step).abs()[..., None] - grid).abs().argmin(-1)
    return (grid[nearest] * parts.sign() * step).view_as(w)


def absmax(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / step).round().clamp(-128, 127) * step


def _per_channel(w: Tensor) -> Tensor:
    zeros = torch.zeros(w.shape[0], dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(w, torch.full((w.shape[0],), 0.05), zeros, 0, -128, 127)


def _scattered(m: Layer) -> Tensor:
    return (m.u @ m.v).view(-1).scatter_add(0, m.places, m.values).view_as(m.weight)


FORMS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "low rank": lambda m, x: F.linear(F.linear(x, m.v), m.u, m.bias),
    "low rank next to it": lambda m, x: F.linear(x, m.weight, m.bias) + F.linear(F.linear(x, m.v), m.u) * 0.5,
    "low rank and sparse": lambda m, x: F.linear(x, _scattered(m), m.bias),
    "masked": lambda m, x: F.linear(x, m.weight * m.mask, m.bias),
    "straight-through": lambda m, x: F.linear(x, straight(m.weight, rounded(m.weight)), m.bias),
    "ternary": lambda m, x: F.linear(x, straight(m.weight, ternary(m.weight)), m.bias),
    "fake quantised": lambda m, x: F.linear(x, torch.fake_quantize_per_tensor_affine(m.weight, 0.1, 0, -9, 9), m.bias),
    "fake quantised by channel": lambda m, x: F.linear(x, _per_channel(m.weight), m.bias),
    "einsum": lambda m, x: torch.einsum("btd,hd->bth", x, m.weight) + m.bias,
    "tensordot": lambda m, x: torch.tensordot(x, m.weight, ([2], [1])) + m.bias,
    "four bits in blocks": lambda m, x: F.linear(x, straight(m.weight, blocks(m.weight)), m.bias),
    "columns": lambda m, x: (m.weight @ x.transpose(1, 2)).transpose(1, 2) + m.bias,
}


def _block(form: Callable[[Layer, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return moved(Block(Layer(form, WIDTH, HIDDEN), Layer(form, HIDDEN, WIDTH)))


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_fold(name: str) -> None:
    report = assert_same_float64(_block(FORMS[name]), (IDS,))
    assert report.counts["to_rms_norm"] == 2 and report.counts["fold_affine"] == 2, report


def test_orthogonal_by_cayley() -> None:
    """The weight needs an identity and zeros, which the graph makes."""
    layers = [parametrizations.orthogonal(nn.Linear(a, b), orthogonal_map="cayley") for a, b in ((8, 16), (16, 8))]
    report = assert_same_float64(moved(Block(*layers)), (IDS,))
    assert report.counts["to_rms_norm"] == 2 and report.counts["fold_affine"] == 2, report


def test_each_factor_takes_what_is_its_own() -> None:
    """γ goes into the first factor of a reader, the centring into the last of a writer; they are not multiplied."""
    after = assert_same_float64(_block(FORMS["low rank"]), (IDS,)).graphs[0].after
    assert "scale_features(read.v" in after and "scale_features(read.u" not in after
    assert "center(write.u" in after and "center(write.v" not in after
    assert "matmul" not in after


@pytest.mark.parametrize("quantise", [rounded, ternary, blocks])
def test_gamma_stays_outside_of_a_quantiser(quantise: Callable[[Tensor], Tensor]) -> None:
    """What is folded into is the quantised weight. Folded in before it γ would give another function."""
    block = _block(lambda m, x: F.linear(x, straight(m.weight, quantise(m.weight)), m.bias))
    after = assert_same_float64(block, (IDS,)).graphs[0].after
    assert "scale_features(%" in after and "scale_features(read.weight" not in after
    weight, gamma = (
        torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(0)),
        torch.linspace(0.1, 3, WIDTH),
    )
    inside, outside = quantise(weight * gamma), quantise(weight) * gamma
    assert (inside - outside).abs().max() > 1e-3 * outside.abs().max()


@pytest.mark.parametrize("normed", [False, True])
def test_quantised_activations_keep_gamma(normed: bool) -> None:
    """BitNet: each row is quantised by its largest entry, with or without another RMSNorm before it: γ stays in the norm.
    The writer's quantised weight is centred."""

    def form(m: Layer, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (x.shape[-1],)) if normed else x
        return F.linear(straight(x, absmax(x)), straight(m.weight, ternary(m.weight)), m.bias)

    report = assert_same_float64(_block(form), (IDS,))
    assert _codes(report, 0, "fold_affine") == ["reader_not_linear"]
    assert report.counts["to_rms_norm"] == 2


def test_rows_of_a_norm_are_no_weight() -> None:
    """Queries and keys, each from a norm: the product is linear in both, and neither norm can give up γ and β."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("td,sd->ts", self.q(x), self.k(y))

    report = assert_same_float64(moved(Scores()), (torch.randn(50, WIDTH), torch.randn(3, WIDTH)))
    assert [_codes(report, i, "fold_affine") for i in (0, 1)] == [["reader_not_linear"]] * 2


@pytest.mark.parametrize("name", ["einsum", "tensordot", "columns"])
def test_a_converted_copy_keeps_beta_where_it_has_no_place(name: str) -> None:
    """A module that multiplies by an einsum has no bias that could take Wβ: its norm keeps γ and β."""
    layers = Layer(FORMS[name], WIDTH, HIDDEN), Layer(FORMS[name], HIDDEN, WIDTH)
    model = moved(Block(*layers)).eval()
    converted = normfx.convert(model, (IDS,))
    assert isinstance(converted.norm, nn.LayerNorm) or converted.norm.weight is not None
    torch.testing.assert_close(converted(IDS), model(IDS))


@pytest.mark.parametrize(("name", "read"), [("BOFTConfig", True), ("HRAConfig", True), ("GraloraConfig", False)])
def test_adapters(name: str, read: bool) -> None:
    """Orthogonal factors of parameters (the graph makes an identity) fold; an adapter that cuts the features into blocks
    reads something other than whole rows."""
    peft = pytest.importorskip("peft")
    settings = {"BOFTConfig": {"boft_block_size": 4}, "HRAConfig": {"r": 2}, "GraloraConfig": {"r": 4, "gralora_k": 2}}
    config = getattr(peft, name)(target_modules=["read", "write"], **settings[name])
    torch.manual_seed(0)
    block = Block(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH))
    model = moved(peft.get_peft_model(block, config).base_model.model)
    report = assert_same_float64(model, (IDS,))
    assert _codes(report, 0, "fold_affine") == ([] if read else ["reader_not_linear"])


class Hyper(nn.Module):
    """A linear whose weight another network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.make = nn.LayerNorm(WIDTH), nn.Linear(2, 3 * WIDTH)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.make(task).tanh().view(3, WIDTH))


@pytest.mark.parametrize(("rows", "codes"), [(200, []), (4, ["computed_weight"])])
def test_a_weight_of_data(rows: int, codes: list[str]) -> None:
    """Folded in every call, where there are rows enough."""
    report = assert_same_float64(moved(Hyper()), (torch.randn(rows, WIDTH), torch.randn(2)))
    assert _codes(report, 0, "fold_affine") == codes


def _codes(report: Report, site: int, rule: str) -> list[str]:
    return [r.code for r in report.sites[site].refusals if r.rule == rule]


class Looked(nn.Module):
    """Each token has a weight of its own, looked up in one parameter, on its way changed as `change` says."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.norm = change, nn.LayerNorm(6, bias=False)
        self.stack = nn.Parameter(torch.randn(5, 6, 4))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.einsum("btd,btdh->bth", self.norm(x), self.change(self.stack, index))


@pytest.mark.parametrize(
    ("change", "folds"),
    [
        (lambda stack, i: stack[i].masked_fill((i > 2)[..., None, None], 0.0), True),
        (lambda stack, i: stack.detach()[i], True),
        (lambda stack, i: F.embedding(i, stack.flatten(1), padding_idx=1).unflatten(-1, (6, 4)), False),
    ],
    ids=["masked", "detached", "padding without a gradient"],
)
def test_gradients_of_looked_up_weights(change: Callable[[Tensor, Tensor], Tensor], folds: bool) -> None:
    """γ keeps the gradient of rows for which the looked-up weight has none."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 6), torch.tensor([[0, 1, 2, 3, 4], [1, 1, 4, 0, 2]])
    (site,) = assert_same_float64(Looked(change), inputs).sites
    assert ("fold_affine" in site.rules) == folds
