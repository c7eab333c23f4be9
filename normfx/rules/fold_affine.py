"""fold_affine: move a norm's γ, β into the linears that read it.

    W (γ⊙z + β)·k + c  ==  (W·γ)(k·z) + (k·Wβ + c)        z is the normalised row, k a number on the way

Nothing is asked of z, so the same moves γ and β of DyT, tanh(αx)·γ + β, and γ of any value that is scaled by a vector.
β moves only where z is known to be of about 1: a large z and a β that takes most of it away again (a BatchNorm written
out) leave W z with errors that W (γ⊙z + β) does not have (docs/design-notes.md, "BatchNorm").

Not for weights stored in half precision: with W·γ rounded to bfloat16 the error against float64 of 24 small models was
0.98 to 1.92 times eager's own; with γ left in the norm and the writers centred, 0.77 to 1.17 times. Under autocast
eager rounds W and c too, but c + Wβ can be much longer than c, and than the errors of y: with a mean in W and β its
rounding is as long as that of the output, and the error 1.4 times eager's. So there γ moves, β does not.

Source: Jiang et al. 2023, appendix ("merge γ and β into the following linear"); here on live parameters (maths M7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Node

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of, entries, shape, size_hint, tensor, total
from normfx.graph.packing import packed_sources
from normfx.ir.sites import Linear, Readers, Sites
from normfx.rules import centring
from normfx.rules.device import device_costs
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols


def fold(weight: Any, bias: Any, gamma: Any, beta: Any, k: Any) -> tuple[Any, Any]:
    """(W·diag(γ), c + k·Wβ); runs on tensors and on arrays of symbols alike."""
    return weight * gamma, bias + k * (weight @ beta)


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    weight, bias, z = symbols("W", 2, d), symbols("c", 2), symbols("z", d)
    gamma, beta, k = symbols("gamma", d), symbols("beta", d), symbols("k", 1)[0]
    new_weight, new_bias = fold(weight, bias, gamma, beta, k)
    yield from zip(weight @ ((gamma * z + beta) * k) + bias, new_weight @ (k * z) + new_bias, strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Readers]:
    return (*sites.readers.values(), *sites.affines)


def guard(site: Readers, so_far: SoFar) -> Iterator[Objection]:
    return objections(site)


def objections(site: Readers) -> Iterator[Objection]:
    """γ and β can move only if every reader is a linear or convolution over the norm's features, with a floating
    weight."""
    norm = site.norm
    if norm.obstacle and site.affine is None:
        yield "opaque_norm", norm.obstacle, (norm.output,)
        return
    if norm.axis is None:
        yield "several_axes", f"dimensions {norm.dims} of {norm.input.name}", (norm.output,)
        return
    if norm.weight is None and norm.bias is None:
        yield "no_affine", "", (norm.output,)
        return
    if site.affine is not None and site.affine.terms and not site.affine.bounded:
        yield "unbounded_shift", norm.input.name, (norm.input,)
    outputs = tuple(node for node in site.others if node.op == "output")
    if outputs:
        yield "returned", "", outputs
    if site.padded:
        yield "padded_reader", ", ".join(node.name for node in site.padded), site.padded
    others = tuple(node for node in site.others if node.op != "output" and node not in site.padded)
    if others:
        yield "reader_not_linear", ", ".join(node.name for node in others), others
    if site.shared:
        yield "shared_weight", ", ".join(node.name for node in site.shared), site.shared
    packed = packed_readers(site)
    if packed:
        yield "packed_weight", ", ".join(node.name for node in packed), packed
    yield from _roundings(site)
    price, sizes = cost(site), (norm.output, *(linear.weight for linear, _, _ in site.linears))
    before, after = size_hint(price.before, sizes), size_hint(price.after, sizes)
    if after > before >= after - size_hint(_added(site), sizes):
        nodes = _biases(site)
        yield "new_bias", ", ".join(node.name for node in nodes), nodes
    elif after > before:
        live = [linear for linear, _, _ in site.linears if _live(linear, site)]
        weights = size_hint(total(entries(shape(linear.weight)) for linear in live), sizes)
        detail = f"{weights} entries of weights, {size_hint(entries(shape(site.norm.output)), sizes)} normalised"
        computed = tuple(linear.node for linear in live if linear.weight in site.computed)
        code = "computed_weight" if computed else "live_weights"
        yield code, detail, computed or tuple(linear.node for linear in live)


def _roundings(site: Readers) -> Iterator[Objection]:
    """What folding would round once more than eager does, or out of range."""
    narrow = narrow_readers(site)
    if narrow:
        yield "rounded_weight", ", ".join(node.name for node in narrow), narrow
        return
    half = tuple(linear.node for linear, _, _ in site.linears if tensor(linear.node).dtype in centring.NARROW)
    if half and site.norm.bias is not None:
        yield "rounded_shift", ", ".join(node.name for node in half), half
    short = tuple(node for node in half if tensor(node).dtype == torch.float16)
    if short and site.norm.weight is not None:
        yield "short_range", ", ".join(node.name for node in short), short


def packed_readers(site: Readers) -> tuple[Node, ...]:
    """Readers, linears and other products, whose weight is stored packed: folded, it would be stored unpacked."""
    fixed = (linear for linear, _, _ in site.linears if linear.weight not in site.computed)
    return (*(linear.node for linear in fixed if packed_sources(linear.weight)), *site.packed)


def narrow_readers(site: Readers) -> tuple[Node, ...]:
    """Readers whose weight is stored in half precision: folded, it would be rounded once more."""
    return tuple(linear.node for linear, _, _ in site.linears if tensor(linear.weight).dtype in centring.NARROW)


LIVE_PASSES = 7
"""Passes over a reader's weight that is folded in every call: W·γ and Wβ forward, dW, dγ and dβ backward."""

LIVE_LAUNCHES = 1
"""Kernels that a GPU starts for such a weight, beyond those of dγ and dβ that it saves."""


def cost(site: Readers) -> Cost:
    """Passes over the rows for γ and β, and for their gradients where they are trained; afterwards none. Kept folded
    weights are free, live ones are read and written in every call."""
    live = [linear.weight for linear, _, _ in site.linears if _live(linear, site)]
    costs = device_costs(site.norm.output)
    trained = bool(live) and torch.is_grad_enabled()
    before = (costs.affine + (costs.affine_grad if trained else 0)) * bytes_of(site.norm.output)
    after = total(LIVE_PASSES * bytes_of(weight) + LIVE_LAUNCHES * costs.launch for weight in live)
    return Cost(before, after + _added(site))


def _added(site: Readers) -> sympy.Expr:
    """Bytes of the passes over products that would get a bias."""
    costs, trained = device_costs(site.norm.output), torch.is_grad_enabled()
    passes = costs.new_bias + (costs.new_bias_grad if trained and not site.live.isdisjoint(site.vectors) else 0)
    return total(passes * bytes_of(node) for node in _biases(site))


def _biases(site: Readers) -> tuple[Node, ...]:
    """The products that would get a bias, where it would be added in passes of its own."""
    shift = site.norm.bias is not None or (site.affine is not None and bool(site.affine.terms))
    if not shift:
        return ()
    bare = (linear for linear, _, _ in site.linears if linear.bias is None and not linear.groups)
    return tuple(linear.node for linear in bare if site.adds_apart or _live(linear, site))


def _live(linear: Linear, site: Readers) -> bool:
    return not site.live.isdisjoint((linear.weight, *site.vectors))


def rewrite(site: Readers, edit: Edit) -> None:
    for linear, axis, factor in site.linears:
        gamma, beta = site.norm.weight, site.norm.bias
        if site.affine is not None:
            gamma, beta = edit.compose(site.affine, linear.node)
        edit.fold_reader(linear, axis, gamma, beta, factor)
    if site.affine is not None:
        edit.drop_affine(site.norm)
    else:
        edit.norm(site.norm).affine = False


class _Read(nn.Module):
    """A norm read by a linear, and by `tap`."""

    packed: torch.Tensor

    def __init__(self, tap: str = "", norm: nn.Module | None = None) -> None:
        super().__init__()
        self.tap = tap
        self.norm = nn.LayerNorm(6) if norm is None else norm
        self.read = nn.Linear(6, 4, bias=tap != "no bias")
        self.convolution = nn.Conv1d(6, 4, 3, padding=1)
        self.register_buffer("packed", torch.arange(24, dtype=torch.int8).reshape(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap in ("bfloat16", "float16"):
            with torch.autocast("cpu", getattr(torch, self.tap)):
                return self.read(self.norm(x))
        y = self.norm(x)
        if self.tap == "unread":
            return x + 0.0 * y.shape[0]
        if self.tap == "convolution":
            return self.convolution(y.transpose(1, 2))
        if self.tap == "padding":
            y = nn.functional.pad(y, (0, 0, 1, 1))
        weight = self.packed.to(x.dtype) * 0.1 if self.tap == "packed" else self.read.weight
        if self.tap == "data":
            weight = torch.outer(x.mean((1, 2)).repeat(2), x.mean((0, 1)))
        out = nn.functional.linear(y, weight, self.read.bias)
        return {"output": (out, y), "activation": (out, torch.tanh(y))}.get(self.tap, out)


class _Statistics(nn.Module):
    """A norm read by a linear, whose mean is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.read = nn.Parameter(torch.linspace(0.5, 1.5, 6)), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y, mean, _ = torch.native_layer_norm(x, [6], self.gain, None, 1e-5)
        return self.read(y), mean


class _Shift(nn.Module):
    """γ ⊙ x + β of a value of any size (the layers of ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.linspace(0.5, 1.5, 6)), nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain + self.shift


class _Shared(nn.Module):
    """One linear after two norms with their own γ and β (WideNet-like)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.read = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self.norm1(x)), self.read(self.norm2(x * x))


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),)


def _many() -> torch.Tensor:
    return torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(0))


PACKED = Code(
    "a reader's weight is stored packed, as integers or floats of 8 bits", "none needed: γ and β stay in the norm"
)
ROUNDED = Code(
    "a reader's weight is stored in half precision: W·γ would have to be rounded again",
    "keep the weights in float32; under autocast γ of a norm without a bias is folded",
)

RULE = Rule(
    name="fold_affine",
    formula="W(γ⊙z + β) + c == (W·γ)z + (Wβ + c)",
    source="Jiang et al. 2023",
    codes={
        "opaque_norm": centring.CODES["opaque_norm"],
        "several_axes": centring.CODES["several_axes"],
        "live_weights": centring.CODES["live_weights"],
        "computed_weight": Code(
            "a reader's weight is computed from data or by a custom function: folded, it would be computed in every "
            "call, and for so few rows that costs more than it saves",
            "none needed: γ and β stay in the norm",
        ),
        "packed_weight": PACKED,
        "shared_weight": Code(
            "a reader's weight is shared with a reader of a norm with other γ or β: each would need a copy of it",
            "none needed: γ and β stay in the norm",
        ),
        "rounded_weight": ROUNDED,
        "rounded_shift": Code(
            "a reader computes in half precision, and c + Wβ may lose more digits to rounding than c does",
            "none needed: γ and β stay in the norm; a norm without a bias is folded",
        ),
        "short_range": Code(
            "a reader computes in float16, and W·γ may leave its range although W and γ do not",
            "none needed: γ stays in the norm; under bfloat16 autocast it is folded",
        ),
        "new_bias": Code(
            "a reader that has no bias would get one, and adding it in a pass over what the reader computes costs more "
            "than γ and β do",
            "none needed: γ and β stay in the norm",
        ),
        "no_affine": Code("the norm has neither weight nor bias", "none needed"),
        "unbounded_shift": Code(
            "β is added to a value that may be large: moved, it would be added to a large product, which costs digits",
            "none needed: β stays after a value of any size; it moves after a norm, or a function like tanh",
        ),
        "returned": Code("the graph returns the norm's output", "none needed: γ and β stay in the norm"),
        "padded_reader": Code(
            "a convolution that pads with zeros, or a transposed one, reads its output: at a border it does not add "
            "all of Wβ",
            "none needed: γ and β stay in the norm; without a bias or without padding they are folded",
        ),
        "reader_not_linear": Code(
            "an op other than a linear over the norm's features reads its output",
            "none needed: γ and β stay in the norm",
        ),
    },
    identity=identity,
    mistake=("fold_affine.fold", lambda w, c, gamma, beta, k: (w * gamma, c)),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    summary="γ and β of {norms} are folded into the weights that read them",
    example=Example("read", _Read, _input),
    counterexamples=(
        Example("padded convolution", lambda: _Read("convolution"), _input, "padded_reader"),
        Example("padded rows", lambda: _Read("padding"), _input, "reader_not_linear"),
        Example("shift of any value", lambda: _Read(norm=_Shift()), _input, "unbounded_shift"),
        Example("nonlinear reader", lambda: _Read("activation"), _input, "reader_not_linear"),
        Example("returned", lambda: _Read("output"), _input, "returned"),
        Example("packed", lambda: _Read("packed"), _input, "packed_weight"),
        Example("weight of data", lambda: _Read("data"), _input, "computed_weight"),
        Example("shared weight", _Shared, _input, "shared_weight"),
        Example("half precision", lambda: _Read().bfloat16(), lambda: (_input()[0].bfloat16(),), "rounded_weight"),
        Example("autocast", lambda: _Read("bfloat16"), _input, "rounded_shift"),
        Example("float16", lambda: _Read("float16", nn.LayerNorm(6, bias=False)), _input, "short_range"),
        Example("no affine", lambda: _Read(norm=nn.LayerNorm(6, elementwise_affine=False)), _input, "no_affine"),
        Example("two axes", lambda: _Read(norm=nn.LayerNorm((5, 6))), _input, "several_axes"),
        Example("statistics returned", _Statistics, _input, "opaque_norm"),
        Example("few rows in training", _Read, _input, "live_weights", fold="auto"),
        Example("no bias to add to", lambda: _Read("no bias"), lambda: (_many(),), "new_bias", fold="auto"),
    ),
)
