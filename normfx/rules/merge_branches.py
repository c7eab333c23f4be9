"""merge_branches: layers that read one value, and whose results are only added together, are one.

    (W₁x + b₁) + λ(W₂x + b₂)      ==  (W₁ + λW₂)x + (b₁ + λb₂)
    (W x + b) + λ(B(A x + a) + c)  ==  (W + λBA)x + (b + λ(Ba + c))
    (W x + b) + (s ⊙ x + t)       ==  (W + diag(s))x + (b + t)        s, t: a BatchNorm with running statistics, or 1, 0

A convolution with a smaller kernel is one with a larger kernel that has zeros around it, where strides, groups and
dilations are the same and the paddings say where it lies; x itself has a kernel of one entry. What is padded with
anything but zeros is padded by an op of its own: two convolutions then read two values.

One layer is left, with as many multiply-adds as the largest one: the others, what they write and its sums go.

Where all branches add up n products for each entry, the bound on the error is eager's or less: eager's is that of each
branch, γₙ|λᵢWᵢ||x| in sum, that of the merged one γₙ|ΣλᵢWᵢ||x| and one rounding of the weight. A branch of fewer
products would take on the error of the longer sum: a smaller kernel up to 1.65 times eager's was measured, x itself up
to 12 times (docs/design-notes.md). These are merged where options["merge_kernels"] says so.

Without gradients alone: the merged weight costs more to compute, and its gradient more to take apart, than most of
these branches cost. It is kept, and computed again when one of the weights changes.

Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", section 3.3; Hu et al. 2021, "LoRA", section
4.1; maths M17.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of, entries, shape, tensor, total
from normfx.graph.packing import packed_sources
from normfx.ir.sites import Branch, Branches, Composition, Linear, Norm, Sites
from normfx.rules import centring, defer_norm, fold_batch_norm
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols


def merge(weights: Iterable[Any], shifts: Iterable[Any], factors: Iterable[Any]) -> tuple[Any, Any]:
    """Σ λᵢWᵢ and Σ λᵢbᵢ; for sympy arrays and torch tensors alike."""
    weight: Any = 0
    shift: Any = 0
    for own, moved, factor in zip(weights, shifts, factors, strict=True):
        weight, shift = weight + own * factor, shift + moved * factor
    return weight, shift


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """For matrices; then for a kernel of one entry in one of three, over d places with zeros around them."""
    x, scale, shift, factor = symbols("x", d), symbols("s", d), symbols("t", d), symbols("l", 1)[0]
    wide, bias = symbols("W", d, d), symbols("b", d)
    inner, low, outer, last = symbols("A", 1, d), symbols("a", 1), symbols("B", d, 1), symbols("c", d)
    diagonal = 0 * wide
    for i in range(d):
        diagonal[i, i] = scale[i]
    weights, shifts = (wide, outer @ inner, diagonal), (bias, outer @ low + last, shift)
    weight, total = merge(weights, shifts, (1, factor, 1))
    branches = (wide @ x + bias) + factor * (outer @ (inner @ x + low) + last) + (scale * x + shift)
    yield from zip(branches, weight @ x + total, strict=True)
    kernel, small = symbols("K", 3), symbols("k", 1)
    padded = 0 * kernel
    padded[1] = small[0]
    merged, _ = merge((kernel, padded), (0, 0), (1, 1))
    places = [sympy.Integer(0), *x, sympy.Integer(0)]
    for i in range(d):
        window = places[i : i + 3]
        yield sum(kernel * window) + small[0] * x[i], sum(merged * window)


@dataclass(frozen=True, eq=False)
class Merge:
    """A sum, and those of its terms that the host is to compute too."""

    branches: Branches
    rest: tuple[Branch, ...]

    @property
    def norms(self) -> tuple[Norm | Composition, ...]:
        """The sum, and BatchNorms that go with what they read."""
        own = (branch.norm for branch in self.rest if not branch.layers)
        return (self.branches, *(site.norm for site in own if site is not None))

    @property
    def layers(self) -> tuple[Linear, ...]:
        return tuple(layer for branch in (self.branches.host, *self.rest) for layer in branch.layers)


def products(branch: Branch) -> int:
    """How many products of x a term adds up for each entry: 1 of x itself."""
    if not branch.layers:
        return 1
    layer = branch.layers[-1]
    return int(entries(shape(layer.weight))) // int(shape(layer.weight)[1 - layer.in_dim])


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Merge]:
    """Yields each sum with the terms that may be merged; with all of them where there are none."""
    for branches in sites.branches:
        fitting = tuple(branch for branch in branches.rest if branch.offsets is not None)
        bounded = tuple(branch for branch in fitting if not _few(branch, branches.host, so_far))
        yield Merge(branches, bounded or fitting or branches.rest)


def _few(branch: Branch, host: Branch, so_far: SoFar) -> bool:
    """Whether a term adds up fewer products than the host, and may not take part in that longer sum."""
    allowed = so_far.options.get("merge_kernels", "equal")
    spared = allowed == "equal" or (allowed == "padded" and not branch.layers)
    return spared and products(branch) < products(host)


def guard(site: Merge, so_far: SoFar) -> Iterator[Objection]:
    branches = site.branches
    apart = tuple(branch.top for branch in site.rest if branch.offsets is None)
    if apart:
        yield "geometry", ", ".join(node.name for node in apart), apart
    few = tuple(branch.top for branch in site.rest if _few(branch, branches.host, so_far))
    if few and not apart:
        counts = ", ".join(f"{branch.top.name} {products(branch)}" for branch in (*site.rest, branches.host))
        yield "rounding", counts, few
    copied = {leaf.node for part in so_far.centred for leaf in part.stream.leaves}
    read = (node for branch in (branches.host, *site.rest) for node in (branch.top, *branch.nodes, *branch.path))
    others = (*branches.others, *(node for node in dict.fromkeys(read) if node in copied and node is not branches.node))
    if others:
        yield "read_elsewhere", ", ".join(node.name for node in others), others
    if branches.written:
        yield "mutated", ", ".join(node.name for node in branches.written), branches.written
    if branches.apart:
        yield "apart", ", ".join(node.name for node in branches.apart), branches.apart
    yield from _rule_objections(site, so_far)
    yield from _weight_objections(site)


def _rule_objections(site: Merge, so_far: SoFar) -> Iterator[Objection]:
    """What other rules have done, or left, that a merged layer could not do."""
    deferred = {linear.node for each in so_far.applied(defer_norm.RULE) for linear, _, _ in each.readers.linears}
    late = tuple(layer.node for layer in site.layers if layer.node in deferred)
    if late:
        yield "deferred", ", ".join(node.name for node in late), late
    folded = {batch_norm.norm for batch_norm in so_far.applied(fold_batch_norm.RULE)}
    own = (branch.norm.norm for branch in (site.branches.host, *site.rest) if branch.norm and branch.layers)
    stays = tuple(norm.output for norm in own if norm not in folded)
    if stays:
        yield "batch_norm", ", ".join(node.name for node in stays), stays


def _weight_objections(site: Merge) -> Iterator[Objection]:
    """What speaks against another weight: how it is stored, what it would be rounded to, how often it is computed."""
    packed = tuple(layer.node for layer in site.layers if packed_sources(layer.weight))
    if packed:
        yield "packed_weight", ", ".join(node.name for node in packed), packed
    narrow = tuple(layer.node for layer in site.layers if tensor(layer.weight).dtype in centring.NARROW)
    half = tuple(layer.node for layer in site.layers if tensor(layer.node).dtype in centring.NARROW)
    if narrow:
        yield "rounded_weight", ", ".join(node.name for node in narrow), narrow
    elif half:
        yield "low_precision", ", ".join(node.name for node in half), half
    if site.branches.live:
        nodes = tuple(layer.node for layer in site.layers)
        yield "live_weights", ", ".join(node.name for node in site.branches.live), nodes


def cost(site: Merge) -> Cost:
    """What the other layers write is read again; x itself is read by the sum. Afterwards neither."""
    return Cost(total(_passes(branch) for branch in site.rest), sympy.Integer(0))


def _passes(branch: Branch) -> sympy.Expr:
    if not branch.layers:
        return bytes_of(branch.top)
    return total(2 * bytes_of(layer.node) for layer in branch.layers)


def rewrite(site: Merge, edit: Edit) -> None:
    edit.merge_branches(site.branches.host, site.rest)


class _Sum(nn.Module):
    """A norm, a linear, a product of two smaller ones as an adapter is; `tap` says what stands next to them."""

    codes: torch.Tensor

    def __init__(self, tap: str = "") -> None:
        super().__init__()
        self.tap = tap
        self.norm, self.wide = nn.LayerNorm(16), nn.Linear(16, 8)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 8)
        self.register_buffer("codes", torch.arange(128, dtype=torch.int8).reshape(8, 16))
        self.requires_grad_(tap == "trained")

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                rows = self.norm(x)
                return torch.relu(self.wide(rows) + 0.5 * self.up(self.down(rows)))
        rows = self.norm(x)
        wide, low = self.wide(rows), self.up(self.down(rows))
        if self.tap == "no gradient":
            with torch.no_grad():
                low = self.up(self.down(rows))
        if self.tap == "packed":
            low = nn.functional.linear(rows, self.codes.to(x.dtype) * 0.01)
        if self.tap == "written":
            out = wide + 0.5 * low
            wide[0].add_(1.0)
            return out, wide.sum()
        out = torch.relu(wide + 0.5 * low)
        return (out, low) if self.tap == "returned" else out


class _Packed(nn.Module):
    """A convolution by a weight that is stored as integers."""

    codes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(144, dtype=torch.uint8).reshape(4, 4, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.codes.to(x.dtype) * 0.01, padding=1)


class _Kernels(nn.Module):
    """Convolutions of one value, `first` and `second`, with a BatchNorm after the second, and their difference."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        first = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second, self.norm = first, second, nn.BatchNorm2d(4)
        fold_batch_norm.moved(self.norm)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.first(x) - self.norm(self.second(x)))


def _rows() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)),)


def _image() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="merge_branches",
    formula="(W₁x + b₁) + λ(W₂x + b₂) == (W₁ + λW₂)x + (b₁ + λb₂)",
    source="Ding et al. 2021, section 3.3",
    codes={
        "geometry": Code(
            "the strides, groups or dilations of the branches differ, or one kernel does not lie in the other",
            "none needed: the branches stay apart",
        ),
        "rounding": Code(
            "a branch adds up fewer products than the largest one, whose rounding error it would take on",
            "where that error is small enough: options={'merge_kernels': 'padded'}, or 'any' for x itself",
        ),
        "read_elsewhere": Code("something else reads what a branch computes", "none needed: the branches stay apart"),
        "mutated": Code("a value that a branch reads or computes is written in place", "write out-of-place: x = x + y"),
        "apart": Code(
            "a branch runs in another mode or on another device than the sum, or its weight is computed too late",
            "run all branches in one torch.no_grad() region, or outside of it",
        ),
        "deferred": Code(
            "a norm is deferred into a branch", "leave the norm: options={'rules': 'default,-defer_norm'}"
        ),
        "batch_norm": Code(
            "a BatchNorm in a branch is not folded into its layer",
            "enable fold_batch_norm, or see what it says of this BatchNorm",
        ),
        "packed_weight": Code(
            "the weight of a branch is stored packed, as integers or floats of 8 bits",
            "none needed: the branches stay apart",
        ),
        "rounded_weight": Code(
            "the weight of a branch is stored in half precision: the sum would have to be rounded again",
            "keep the weights in float32",
        ),
        "low_precision": Code(
            "the branches compute in half precision, which would round the sum of their weights once more",
            "none needed: the branches stay apart",
        ),
        "live_weights": Code(
            "the merged weight would be computed in every call: its gradient is wanted, or folds are live",
            "run inference under torch.no_grad(), with options={'fold': 'auto'}",
        ),
    },
    identity=identity,
    mistake=("merge_branches.merge", lambda weights, shifts, factors: (sum(weights), sum(shifts))),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    options={"merge_kernels": ("equal", "padded", "any")},
    example=Example("an adapter", _Sum, _rows, fold="cached"),
    counterexamples=(
        Example(
            "dilated",
            lambda: _Kernels(nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
            _image,
            "geometry",
            fold="cached",
        ),
        Example("a smaller kernel", lambda: _Kernels(nn.Conv2d(4, 4, 1)), _image, "rounding", fold="cached"),
        Example("returned", lambda: _Sum("returned"), _rows, "read_elsewhere", fold="cached"),
        Example("written", lambda: _Sum("written"), _rows, "mutated", fold="cached"),
        Example("no gradient", lambda: _Sum("no gradient"), _rows, "apart", fold="cached"),
        Example(
            "deferred norm",
            _Sum,
            _rows,
            "deferred",
            fold="cached",
            options={"rules": "default,+defer_norm,+merge_branches", "defer_means": "small"},
        ),
        Example("a BatchNorm that stays", lambda: _Kernels(_Packed()), _image, "batch_norm", fold="cached"),
        Example("packed", lambda: _Sum("packed"), _rows, "packed_weight", fold="cached"),
        Example(
            "half precision",
            lambda: _Sum().bfloat16(),
            lambda: (_rows()[0].bfloat16(),),
            "rounded_weight",
            fold="cached",
        ),
        Example("autocast", lambda: _Sum("autocast"), _rows, "low_precision", fold="cached"),
        Example("trained", lambda: _Sum("trained"), _rows, "live_weights", fold="cached"),
    ),
)
