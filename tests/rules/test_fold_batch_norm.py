"""BatchNorms folded into what they read: every form, the traps, and statistics that move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_nets import moved, net
from equivalence import EagerBackend, assert_same_float64, transformed
from expecttest import TestCase
from torch import Tensor, nn

import normfx
from normfx.report import Report


class Function(nn.Module):
    """A forward pass as a function of its layers and the input."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 6), generator=torch.Generator().manual_seed(0))


def folded(report: Report) -> list[bool]:
    return [site.rules == ("fold_batch_norm",) for site in report.sites if site.kind == "BatchNorm"]


def codes(report: Report) -> set[str]:
    return {refusal.code for site in report.sites for refusal in site.refusals}


FORMS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: chain(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)), images(2, 4, 8)),
    "conv3d": (lambda: chain(nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6)), images(2, 4, 3, 3, 3)),
    "depthwise": (lambda: chain(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)), images()),
    "groups": (lambda: chain(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)), images()),
    "transposed, groups": (
        lambda: chain(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6)), images(),
    ),
    "same padding": (lambda: chain(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), images()),
    "linear": (lambda: chain(nn.Linear(4, 6), nn.BatchNorm1d(6)), images(5, 4)),
    "linear, rows flattened and back": (  # LeViT
        lambda: Function(
            lambda m, x: torch.tanh(m.norm((y := m.write(x)).flatten(0, 1)).reshape_as(y)),
            write=nn.Linear(4, 6, bias=False), norm=nn.BatchNorm1d(6),
        ),
        images(2, 5, 4),
    ),
    "linear, channels first": (
        lambda: Function(lambda m, x: m.norm(m.write(x).mT), write=nn.Linear(4, 6), norm=nn.BatchNorm1d(6)),
        images(2, 5, 4),
    ),
    "dilated, strided, depthwise": (
        lambda: chain(nn.Conv2d(4, 8, 2, stride=2, dilation=2, groups=4), nn.BatchNorm2d(8, momentum=None)), images(),
    ),
    "transposed, dilated, three dimensions": (
        lambda: chain(
            nn.ConvTranspose3d(4, 6, 2, 2, groups=2, output_padding=1, dilation=2, padding=1), nn.BatchNorm3d(6)
        ),
        images(1, 4, 2, 2, 2),
    ),
    "pads with copies": (
        lambda: chain(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(6)), images(),
    ),
    "after a mean": (
        lambda: Function(
            lambda m, x: m.norm(m.write(x).mean((2, 3))), write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm1d(6)
        ),
        images(),
    ),
    "two that read one weight": (
        lambda: Function(
            lambda m, x: (m.first(F.conv2d(x, m.write.weight)), m.second(F.conv2d(-x, m.write.weight)), m.write(x)),
            write=nn.Conv2d(4, 6, 3), first=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6),
        ),
        images(),
    ),
    "one module, called twice": (
        lambda: Function(
            lambda m, x: m.norm(m.write(x)) + m.norm(m.write(-x)), write=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)
        ),
        images(),
    ),
    "added to afterwards": (
        lambda: Function(lambda m, x: m.norm(m.write(x)).add_(x), write=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)),
        images(),
    ),
    "channels last": (
        lambda: chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(memory_format=torch.channels_last),
        images().to(memory_format=torch.channels_last),
    ),
    "given as arguments": (
        lambda: Function(
            lambda m, x: F.batch_norm(m.write(x), m.norm.running_mean, m.norm.running_var, None, m.norm.bias, eps=0.1),
            write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6),
        ),
        images(),
    ),
    "after a LayerNorm of a stream, before another": (
        lambda: Function(
            lambda m, x: m.head(m.last((h := m.enter(x)) + m.norm(m.write(m.first(h))))),
            enter=nn.Linear(4, 6), first=nn.LayerNorm(6), write=nn.Linear(6, 6), norm=nn.BatchNorm1d(6),
            last=nn.LayerNorm(6), head=nn.Linear(6, 3),
        ),
        images(5, 4),
    ),
    "RMSNorm after it, and a stream": (
        lambda: Function(
            lambda m, x: m.read(m.layer(m.norm(m.write(x)) + m.skip(x))),
            write=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), skip=nn.Linear(4, 6), layer=nn.LayerNorm(6),
            read=nn.Linear(6, 3),
        ),
        images(5, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    """Outputs and gradients in float64, live and kept; every BatchNorm is folded."""
    build, x = FORMS[name]
    report = assert_same_float64(moved(build()), (x,))
    assert folded(report) and all(folded(report))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an activation, with a reader that could": (
        lambda: chain(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), "no_writer",
    ),
    "an input, with a reader that could": (
        lambda: chain(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)), "no_writer",
    ),
    "zeros around what it reads": (
        lambda: chain(nn.Conv2d(4, 6, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(6)), "no_writer",
    ),
    "variance of 0 and no epsilon": (
        lambda: chain(nn.Conv2d(4, 6, 3), _constant(nn.BatchNorm2d(6, 1e-40))), "no_epsilon",
    ),
    "writer returned": (
        lambda: Function(lambda m, x: (m.norm(y := m.write(x)), y), write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)),
        "writer_read",
    ),
    "two read one writer": (
        lambda: Function(
            lambda m, x: m.norm(y := m.write(x)) * m.other(y),
            write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6), other=nn.BatchNorm2d(6),
        ),
        "writer_read",
    ),
    "written before it is read": (
        lambda: Function(lambda m, x: m.norm(m.write(x).relu_()), write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)),
        "no_writer",
    ),
    "over the positions": (
        lambda: Function(lambda m, x: m.norm(m.write(x)), write=nn.Linear(6, 5), norm=nn.BatchNorm2d(4)), "no_writer",
    ),
    "batch statistics": (
        lambda: chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), "batch_statistics",
    ),
    "statistics written in forward": (
        lambda: Function(_adapts, write=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)), "computed",
    ),
}  # fmt: skip


def _constant(norm: nn.Module) -> nn.Module:
    torch.nn.init.zeros_(norm.get_buffer("running_var"))
    return norm


def _adapts(model: Any, x: Tensor) -> Tensor:
    y = model.write(x)
    model.norm.running_mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
    out: Tensor = model.norm(y)
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, code = REFUSED[name]
    model = moved(build())
    with torch.no_grad():
        want = copy.deepcopy(model)(images())
        got, report = transformed(model, (images(),), {"fold": "cached"})
    assert code in codes(report) and not any(folded(report))
    torch.testing.assert_close(got, want)


def test_training_mode_is_left_alone() -> None:
    """Statistics of the batch, and the running ones move as in eager mode."""
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).train()
    twin = copy.deepcopy(model)
    want = twin(images())
    got, report = transformed(model, (images(),))
    assert codes(report) == {"batch_statistics"}
    torch.testing.assert_close((got, model[1].running_mean, model[1].running_var),
                               (want, twin[1].running_mean, twin[1].running_var))  # fmt: skip


def test_only_what_wants_a_gradient_gets_one() -> None:
    """Statistics never do; frozen weights stay without; γ and β alone, as test-time adaptation trains them (Tent)."""
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    for layer in (model[0], model[3]):
        layer.requires_grad_(False)
    assert folded(assert_same_float64(model, (images(),))) == [True]


@pytest.mark.parametrize("rows", [1, 64])
def test_live_weights_are_priced(rows: int) -> None:
    """Few rows do not pay for folding the weight in every call when gradients are recorded; many do."""
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    _, report = transformed(model, (images(rows, 4, 6, 6),), {"fold": "auto"})
    assert (folded(report), codes(report)) == (([False], {"live_weights"}) if rows == 1 else ([True], set()))


def test_no_rows() -> None:
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad():
        got, report = transformed(model, (images(0, 4, 6, 6),), {"fold": "cached"})
    assert got.shape == (0, 6, 4, 4) and folded(report) == [True]


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda norm: norm.running_mean.add_(1.0),
    "data": lambda norm: norm.running_var.data.mul_(3.0),
    "data, one entry": lambda norm: norm.running_mean.data[1].sub_(2.0),
    "weight": lambda norm: norm.weight.data.neg_(),
    "load_state_dict": lambda norm: norm.load_state_dict({k: v + 1 for k, v in norm.state_dict().items()}),
    "another buffer": lambda norm: setattr(norm, "running_mean", norm.running_mean + 1.0),
    "reset": lambda norm: norm.reset_running_stats(),
}


def _adaptation(fold: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)))
    model = model if fold == "frozen" else model.double()  # oneDNN packs no convolution in float64
    compiled = torch.compile(model, backend="normfx", options={"fold": fold, "strict": True})

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = compiled(x)
        return out

    return model, call


def _agrees(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        want: Tensor = copy.deepcopy(model)(x)
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(call(x), want, rtol=tolerance, atol=tolerance)
    return want


@pytest.mark.parametrize("fold", ["cached", pytest.param("frozen", marks=pytest.mark.slow)])
def test_statistics_that_move(fold: str) -> None:
    """The next call is right after each kind of write, and after batches in training mode between calls."""
    model, call = _adaptation(fold)
    x = images().to(model[0].weight.dtype)
    before = _agrees(model, call, x)
    assert folded(normfx.compiled_report()) == [True, True]
    for name, write in WRITES.items():
        for norm in (model[1], model[4]):
            with torch.no_grad():
                write(norm)
            after = _agrees(model, call, x)
            assert (after - before).abs().max() > 1e-3, f"{name}: the write does not show"
            before = after
            with torch.no_grad():
                moved(norm, 3)
            before = _agrees(model, call, x)
    model.train()
    call(x)
    _agrees(model, call, x)
    after = _agrees(model.eval(), call, x)
    assert (after - before).abs().max() > 1e-3


def test_autocast_keeps_it() -> None:
    """The products are in bfloat16, and the BatchNorm computes in float32: t is not rounded."""
    model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(images())
        got, report = transformed(model, (images(),), {"fold": "cached"})
    assert codes(report) == {"rounded_shift"}
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_nets(seed: int) -> None:
    """Every second net with gradients and live folds, the others with kept ones.

    The floor is higher than elsewhere, for a last BatchNorm that subtracts the mean of the batch cancels gradients of
    hundreds: in net 40 eager's own moves as far when its weights move by one unit of rounding.
    """
    model, inputs = net(seed)
    if seed % 2 == 0:
        assert_same_float64(model, inputs, {"fold": "live"}, tolerance=1e-11, floor=1e-2)
        return
    torch._dynamo.reset()
    backend = EagerBackend({"fold": "cached"})
    with torch.no_grad():
        want = model(inputs[0].clone())
        got = torch.compile(model, backend=backend, fullgraph=True)(inputs[0].clone())
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()


class Goldens(TestCase):
    maxDiff = None

    def test_plan_and_graph(self) -> None:
        model = moved(chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)))
        assert_same_float64(model, (images(),))
        report = transformed(model, (images(),))[1]
        self.assertExpectedInline(
            _ascii(f"{report}\n\n{report.graphs[0].after}"),
            """\
2 BatchNorms: 1 is folded into a linear layer or convolution; predicted to save
768 bytes of memory traffic per call.
Most frequent reasons why not more:
- fold_batch_norm, 1 norm: what it reads is not the output of a linear or
  convolution over its channels, with a weight of parameters
  hint: none needed: it stays as it is

1  BatchNorm  fold_batch_norm
3  BatchNorm  -
  fold_batch_norm refused (no_writer): what it reads is not the output of a
    linear or convolution over its channels, with a weight of parameters
    found: relu
    hint: none needed: it stays as it is

Bytes per call that pass over activations and live weights, predicted:
  fold_batch_norm  768 to 0

args.0: f32[2, 4, 6, 6]
%0 = channel_scale(1.running_var, 1.weight, eps=1e-05): f64[6]
%1 = channel_shift(1.running_mean, %0, bias=1.bias, 0.bias): f32[6]
%2 = scale_channels(0.weight, %0, dim=0, groups=1): f32[6, 4, 3, 3]
%3 = conv2d(args.0, %2, %1): f32[2, 6, 4, 4]
%4 = relu(%3): f32[2, 6, 4, 4]
%5 = batch_norm(%4, 3.weight, 3.bias, 3.running_mean, 3.running_var, False, 0.1, 1e-05, True): f32[2, 6, 4, 4]  # 3
%6 = conv2d(%5, 4.weight, 4.bias): f32[2, 2, 4, 4]
return [%6]""",
        )


def _ascii(text: str) -> str:
    text = text.translate({ord("γ"): "gamma", ord("β"): "beta", ord("×"): "x", ord("…"): ".."})
    return "\n".join(line for line in text.splitlines() if not line.startswith("    at "))
