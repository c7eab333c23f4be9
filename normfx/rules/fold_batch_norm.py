"""fold_batch_norm: a BatchNorm with running statistics is folded into the linear or convolution that it reads.

    BN(x) = s·(x − mean) + β              s = γ/sqrt(var + ε), for each channel

    BN(W a + b)  ==  (s ⊙ W) a + (s·(b − mean) + β)          W over its output channels

Groups, strides, padding, dilation and transposition of a convolution leave output channels alone.

It is not folded into what reads it: W BN(x) + c == (W·s) x + (W t + c) with t = β − s·mean is the same equation on
real numbers, but there products of x are summed and most of the sum is taken away again, where |mean| is larger than
the deviation: measured 7 to 14 times eager's error in float32, and hundreds of times it in TF32. A fold into the
writer has eager's own bound on the error: x is a sum of products there and here (docs/design-notes.md).

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
from normfx.graph.nodes import bytes_of, entries, shape, size_hint, tensor, total
from normfx.graph.packing import packed_sources
from normfx.ir.sites import BatchNorm, Linear, Sites
from normfx.rules import centring
from normfx.rules.device import device_costs
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols

LIVE_PASSES = 5
"""Passes over a weight that is folded in every call: W is read and s·W written; for dW and dγ the gradient of s·W and
W are read, and dW is written."""


def fold(weight: Any, bias: Any, scale: Any, mean: Any, beta: Any) -> tuple[Any, Any]:
    """Weight and bias of the map s·(W a + b − mean) + β; for sympy arrays and torch tensors alike."""
    return scale[:, None] * weight, scale * (bias - mean) + beta


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """The equation for a matrix; a convolution is one for each tap of its kernel."""
    a, eps = symbols("a", 2), symbols("eps", 1)[0]
    gamma, beta, mean, var = symbols("gamma", d), symbols("beta", d), symbols("mean", d), symbols("var", d)
    scale = gamma / _roots(var + eps)
    weight, bias = symbols("W", d, 2), symbols("b", d)
    normalised = (weight @ a + bias - mean) / _roots(var + eps) * gamma + beta
    new_weight, new_bias = fold(weight, bias, scale, mean, beta)
    yield from zip(normalised, new_weight @ a + new_bias, strict=True)


def _roots(values: Any) -> Any:
    roots = values.copy()
    roots[:] = [sympy.sqrt(value) for value in values]
    return roots


def candidates(sites: Sites, so_far: SoFar) -> Iterable[BatchNorm]:
    return sites.batch_norms


def guard(site: BatchNorm, so_far: SoFar) -> Iterator[Objection]:
    if site.obstacle:
        yield site.obstacle, ", ".join(node.name for node in site.nodes), site.nodes
        return
    if site.writer is None:
        yield "no_writer", site.norm.input.name, (site.norm.input,)
        return
    if site.others:
        yield "writer_read", ", ".join(node.name for node in site.others), (site.writer.node, *site.others)
    if site.apart:
        yield "apart", site.apart, (site.writer.node,)
    yield from _weight_objections(site, site.writer)


def _weight_objections(site: BatchNorm, writer: Linear) -> Iterator[Objection]:
    """What speaks against another weight: how it is stored, what it would be rounded to, what it would cost."""
    if packed_sources(writer.weight):
        yield "packed_weight", writer.node.name, (writer.node,)
    if tensor(writer.weight).dtype in centring.NARROW:
        yield "rounded_weight", writer.node.name, (writer.node,)
    elif tensor(writer.node).dtype in centring.NARROW:
        yield "rounded_shift", writer.node.name, (writer.node,)
    price, sizes = cost(site), (site.norm.output, writer.weight)
    if size_hint(price.after, sizes) > size_hint(price.before, sizes):
        weights, normalised = (size_hint(entries(shape(node)), sizes) for node in (writer.weight, site.norm.output))
        yield "live_weights", f"{weights} entries of weights, {normalised} normalised", (writer.node,)


def cost(site: BatchNorm) -> Cost:
    """A pass over its output, and those for the gradients of γ and β; afterwards none, but for a live weight."""
    costs = device_costs(site.norm.output)
    trained = site.live and torch.is_grad_enabled()
    before = (costs.affine + (costs.affine_grad if trained else 0)) * bytes_of(site.norm.output)
    live = (site.writer.weight,) if site.writer is not None and site.live else ()
    return Cost(before, total(LIVE_PASSES * bytes_of(weight) + costs.launch for weight in live))


def rewrite(site: BatchNorm, edit: Edit) -> None:
    edit.fold_into_writer(site)


class _Block(nn.Module):
    """A convolution, a BatchNorm, and what `tap` puts next to them."""

    codes: torch.Tensor

    def __init__(self, tap: str = "", channels: int = 4) -> None:
        super().__init__()
        self.tap = tap
        self.write = nn.Conv2d(3, channels, 3, bias=False)
        eps = 1e-40 if tap == "no epsilon" else 1e-5  # torch 2.11 takes no 0
        self.norm = nn.BatchNorm2d(channels, eps, track_running_stats=tap != "no statistics")
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
        if self.tap in ("computed", "two dimensions"):
            norm, computed = self.norm, self.tap == "computed"
            mean = x.detach().mean().expand(4) if computed else norm.running_mean
            bias = norm.bias if computed else norm.bias.detach().view(2, 2)  # torch has no gradient for such a one
            return torch.relu(nn.functional.batch_norm(written, mean, norm.running_var, norm.weight, bias))
        if self.tap == "written":
            out = self.norm(written)
            out[0].add_(1.0)
            return torch.view_as_real(torch.complex(out, out)), out
        out = self.norm(torch.relu(written) if self.tap == "activation" else written)
        return (torch.relu(out), written) if self.tap == "observed" else torch.relu(out)


def moved(norm: nn.Module) -> nn.Module:
    """Change statistics, weight and bias: with those of a fresh module a wrong fold would not show."""
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
    formula="BN(Wa + b) == (s ⊙ W)a + (s·(b − mean) + β)",
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
        "vectors": Code(
            "its statistics, weight or bias are not one number for each channel along a single dimension",
            "give them the shape (C,)",
        ),
        "no_epsilon": Code(
            "with so small an ε a channel of variance 0 is infinite, and s·W too", "give it an ε like the usual 1e-5"
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
            "the linear or convolution that it reads runs in another mode or on another device",
            "run both in one torch.no_grad() region, or outside of it",
        ),
        "packed_weight": Code(
            "the weight is stored packed, as integers or floats of 8 bits", "none needed: it stays as it is"
        ),
        "rounded_weight": Code(
            "the weight is stored in half precision: s·W would have to be rounded again",
            "keep the weights in float32",
        ),
        "rounded_shift": Code(
            "the linear or convolution computes in half precision, which rounds the new bias and weight once more",
            "none needed: it stays as it is",
        ),
        "live_weights": centring.CODES["live_weights"],
    },
    identity=identity,
    mistake=("fold_batch_norm.fold", lambda w, b, scale, mean, beta: (scale[:, None] * w, scale * b + beta)),
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
        _refused("two dimensions", "vectors"),
        _refused("no epsilon", "no_epsilon"),
        _refused("activation", "no_writer"),
        _refused("observed", "writer_read"),
        _refused("no gradient", "apart"),
        _refused("packed", "packed_weight"),
        _refused("bfloat16", "rounded_shift"),
        Example("half precision", lambda: _Block().bfloat16(), lambda: (_input()[0].bfloat16(),), "rounded_weight"),
        Example("few rows", _Block, _input, "live_weights", fold="auto"),
    ),
)
