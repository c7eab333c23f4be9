"""fold_batch_norm: a BatchNorm with running statistics is folded into a linear or convolution next to it.

    BN(x) = s ⊙ x + t          s = γ/sqrt(var + ε),  t = β − s·mean          for each channel

    BN(W a + b)   ==  (s ⊙ W) a + (s·(b − mean) + β)       into what it reads; W over its output channels
    W BN(x) + c   ==  (W·s) x + (W t + c)                  else into all that read it; W over its input channels

Of the two the first is free of conditions on the convolution: groups, strides, padding and transposition leave output
channels alone. Against the second, t would have to be in what a convolution pads with, which is zeros.

That the module is in eval says nothing of its statistics: test-time adaptation writes them between calls. They are
sources of the fold as the weights are (weights/store.py), and with gradients γ, β and W get their own.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2 (batch normalization folding); maths M16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn

from normfx.edit import Edit
from normfx.ir.graph import bytes_of, entries, shape, size_hint, tensor, total
from normfx.ir.packing import packed_sources
from normfx.ir.sites import BatchNorm, Linear, Sites
from normfx.rules import centring, fold_affine
from normfx.rules.device import device_costs
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols

LIVE_PASSES = 5
"""Passes over a writer's weight that is folded in every call: W is read and s·W written; for dW and dγ the gradient of
s·W and W are read, and dW is written. A reader's also gives W t: as many as in fold_affine."""


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """Both directions, for a matrix; a convolution is one for each tap of its kernel."""
    x, a, eps = symbols("x", d), symbols("a", 2), symbols("eps", 1)[0]
    gamma, beta, mean, var = symbols("gamma", d), symbols("beta", d), symbols("mean", d), symbols("var", d)
    scale = gamma / _roots(var + eps)

    def batch_norm(value: Any) -> Any:
        return (value - mean) / _roots(var + eps) * gamma + beta

    weight, bias = symbols("W", d, 2), symbols("b", d)
    yield from zip(
        batch_norm(weight @ a + bias), (scale[:, None] * weight) @ a + (scale * (bias - mean) + beta), strict=True
    )
    reader, c = symbols("V", 2, d), symbols("c", 2)
    shift = beta - scale * mean
    yield from zip(reader @ batch_norm(x) + c, (reader * scale) @ x + (reader @ shift + c), strict=True)


def _roots(values: Any) -> Any:
    roots = values.copy()
    roots[:] = [sympy.sqrt(value) for value in values]
    return roots


def candidates(sites: Sites, so_far: SoFar) -> Iterable[BatchNorm]:
    return sites.batch_norms


def guard(site: BatchNorm, so_far: SoFar) -> Iterator[Objection]:
    """It is folded into what it reads, else into what reads it; where neither takes it, both say why."""
    if site.obstacle:
        yield site.obstacle, ", ".join(node.name for node in site.nodes), site.nodes
        return
    before = list(_writer_objections(site))
    after = list(_reader_objections(site)) if before else []
    if before and after:
        yield from dict.fromkeys((*before, *after))


def _writer_objections(site: BatchNorm) -> Iterator[Objection]:
    if site.writer is None:
        yield "no_writer", site.norm.input.name, (site.norm.input,)
        return
    if site.others:
        yield "writer_read", ", ".join(node.name for node in site.others), (site.writer.node, *site.others)
    if site.apart:
        yield "apart", site.apart, (site.writer.node,)
    yield from _weight_objections((site.writer,), site)


def _reader_objections(site: BatchNorm) -> Iterator[Objection]:
    others = site.readers.others
    linears = tuple(linear for linear, _, _ in site.readers.linears)
    if others or not linears:
        yield "reader_not_linear", ", ".join(node.name for node in others), others or (site.norm.output,)
    for linear in linears:
        if tensor(linear.weight).device != tensor(site.norm.output).device:
            yield "apart", f"{linear.node.name} is on another device", (linear.node,)
        if linear.border:
            yield "border", f"{linear.node.name}: {linear.border}", (linear.node,)
    yield from _weight_objections(linears, site)


def _weight_objections(linears: tuple[Linear, ...], site: BatchNorm) -> Iterator[Objection]:
    """What speaks against another weight: how it is stored, what it would be rounded to, what it would cost."""
    packed = tuple(linear.node for linear in linears if packed_sources(linear.weight))
    if packed:
        yield "packed_weight", ", ".join(node.name for node in packed), packed
    narrow = tuple(linear.node for linear in linears if tensor(linear.weight).dtype in centring.NARROW)
    half = tuple(linear.node for linear in linears if tensor(linear.node).dtype in centring.NARROW)
    if narrow or half:
        code = "rounded_weight" if narrow else "rounded_shift"
        yield code, ", ".join(node.name for node in narrow or half), narrow or half
    price = _cost(linears, site)
    sizes = (site.norm.output, *(linear.weight for linear in linears))
    if size_hint(price.after, sizes) > size_hint(price.before, sizes):
        live = _live(linears, site)
        weights = size_hint(total(entries(shape(linear.weight)) for linear in live), sizes)
        detail = f"{weights} entries of weights, {size_hint(entries(shape(site.norm.output)), sizes)} normalised"
        yield "live_weights", detail, tuple(linear.node for linear in live)


def cost(site: BatchNorm) -> Cost:
    """A pass over its output, and those for the gradients of γ and β; afterwards none, but for live weights."""
    return _cost(_targets(site), site)


def _cost(linears: tuple[Linear, ...], site: BatchNorm) -> Cost:
    live = _live(linears, site)
    costs = device_costs(site.norm.output)
    trained = bool(live) and torch.is_grad_enabled()
    before = (costs.affine + (costs.affine_grad if trained else 0)) * bytes_of(site.norm.output)
    passes = LIVE_PASSES if linears == (site.writer,) else fold_affine.LIVE_PASSES
    after = total(passes * bytes_of(linear.weight) + costs.launch for linear in live)
    return Cost(before, after)


def _live(linears: tuple[Linear, ...], site: BatchNorm) -> tuple[Linear, ...]:
    own = (site.norm.weight, site.norm.bias, site.mean, site.var)
    return tuple(
        linear
        for linear in linears
        if not site.readers.live.isdisjoint(node for node in (*own, linear.weight) if node is not None)
    )


def _into_writer(site: BatchNorm) -> bool:
    return not site.obstacle and not any(_writer_objections(site))


def _targets(site: BatchNorm) -> tuple[Linear, ...]:
    if _into_writer(site) and site.writer is not None:
        return (site.writer,)
    return tuple(linear for linear, _, _ in site.readers.linears)


def rewrite(site: BatchNorm, edit: Edit) -> None:
    if _into_writer(site):
        edit.fold_into_writer(site)
    else:
        edit.fold_into_readers(site)


class _Block(nn.Module):
    """A convolution, a BatchNorm, and what `tap` puts next to them."""

    codes: torch.Tensor

    def __init__(self, tap: str = "", channels: int = 4) -> None:
        super().__init__()
        self.tap = tap
        self.write = nn.Conv2d(3, channels, 3, bias=False)
        self.read = nn.Conv2d(channels, 6, 3, padding=int(tap == "padded"))
        self.norm = nn.BatchNorm2d(channels, track_running_stats=tap != "no statistics")
        self.register_buffer("codes", torch.arange(108, dtype=torch.int8).reshape(4, 3, 3, 3))
        moved(self.norm)

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap in ("bfloat16", "float16"):
            with torch.autocast("cpu", getattr(torch, self.tap)):
                return torch.relu(self.norm(self.write(x)))
        if self.tap == "no gradient":
            with torch.no_grad():
                written = self.write(x)
            return torch.relu(self.norm(written))
        if self.tap == "packed":
            written = nn.functional.conv2d(x, self.codes.to(x.dtype) * 0.01)
            return torch.relu(self.norm(written))
        written = self.write(x)
        if self.tap == "computed":
            norm, mean = self.norm, x.detach().mean().expand(4)
            return torch.relu(nn.functional.batch_norm(written, mean, norm.running_var, norm.weight, norm.bias))
        if self.tap == "written":
            out = self.norm(written)
            out[0].add_(1.0)
            return torch.view_as_real(torch.complex(out, out)), out
        out = self.norm(torch.relu(written) if self.tap in ("padded", "activation", "read") else written)
        if self.tap in ("padded", "read"):
            return self.read(out)
        return (torch.relu(out), written) if self.tap == "observed" else torch.relu(out)


def moved(norm: nn.Module) -> nn.Module:
    """With statistics, weight and bias that are not those of a fresh module, with which a wrong fold would not show."""
    with torch.no_grad():
        for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
            if tensor.is_floating_point():
                ramp = torch.linspace(0.5, 2.0, tensor.numel(), dtype=tensor.dtype)
                tensor.copy_(ramp.flip(0) if name.endswith(("bias", "mean")) else ramp)
    return norm


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)


def _refused(name: str, code: str, tap: str = "", build: Callable[[], nn.Module] | None = None) -> Example:
    return Example(name, build or (lambda: _Block(tap or name)), _input, code)


RULE = Rule(
    name="fold_batch_norm",
    formula="BN(Wa + b) == (s ⊙ W)a + (s·(b − mean) + β);  W BN(x) + c == (W·s)x + (W t + c)",
    source="Jacob et al. 2018, section 3.2",
    codes={
        "batch_statistics": Code(
            "it normalises by the statistics of the batch",
            "for inference call model.eval(), with track_running_stats=True",
        ),
        "computed": Code(
            "its statistics, weight or bias are computed from data or written in the graph",
            "keep them in parameters and buffers that forward does not write",
        ),
        "mutated": Code("its input or output is written in place", "write out-of-place: x = x + y"),
        "opaque_norm": Code(
            "its own statistics are read, its number of channels is symbolic or 1, or it changes the dtype",
            "none needed",
        ),
        "no_writer": Code(
            "what it reads is not the output of a linear or convolution over its channels, with a weight of parameters",
            "none needed: it stays as it is",
        ),
        "writer_read": Code(
            "the linear or convolution that it reads is read by something else too",
            "none needed: it stays as it is",
        ),
        "apart": Code(
            "the linear or convolution next to it runs in another mode or on another device",
            "run both in one torch.no_grad() region, or outside of it",
        ),
        "reader_not_linear": Code(
            "something other than a linear or convolution over its channels reads its output, or nothing does",
            "none needed: it stays as it is",
        ),
        "border": Code(
            "a convolution reads it whose sum has fewer terms at some positions: t is not the same there",
            "put the BatchNorm after a convolution, or pad before it",
        ),
        "packed_weight": Code(
            "the weight is stored packed, as integers or floats of 8 bits", "none needed: it stays as it is"
        ),
        "rounded_weight": Code(
            "the weight is stored in half precision: s·W would have to be rounded again",
            "keep the weights in float32",
        ),
        "rounded_shift": Code(
            "the linear or convolution computes in half precision, which rounds t: it may be longer than the output",
            "none needed: it stays as it is",
        ),
        "live_weights": centring.CODES["live_weights"],
    },
    identity=identity,
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    summary="{norms} {are} folded into a linear layer or convolution",
    example=Example("convolution", _Block, _input),
    counterexamples=(
        _refused("no statistics", "batch_statistics"),
        _refused("computed", "computed"),
        _refused("written", "mutated"),
        _refused("one channel", "opaque_norm", build=lambda: _Block(channels=1)),
        _refused("activation", "no_writer"),
        _refused("activation", "reader_not_linear"),
        _refused("observed", "writer_read"),
        _refused("no gradient", "apart"),
        _refused("padded", "border"),
        _refused("packed", "packed_weight"),
        _refused("bfloat16", "rounded_shift"),
        Example("half precision", lambda: _Block().bfloat16(), lambda: (_input()[0].bfloat16(),), "rounded_weight"),
        Example("few rows", _Block, _input, "live_weights", fold="auto"),
    ),
)
