"""merge_linears: two linear layers with nothing between are one, where that computes less.

    W₂ (W₁ a + b₁) + b₂  ==  (W₂W₁) a + (W₂b₁ + b₂)

W₂W₁ has m·n entries for n features in and m out, W₁ and W₂ together h·(n + m) for h between: it is less where
h > m·n/(n + m), so layers that were factorised to save stay two. Multiply-adds of a call and bytes of weights shrink by
the same factor, and the h features between are neither written nor read. A convolution before one whose kernel is a
single entry is the same for each entry of its kernel, whatever its stride and padding.

Errors are no larger than those of two layers, whose bound |W₂||W₁||a| is that of the kept product, too. Where weights
are trained the product is computed in every call, which pays for many rows.

Source: Ding et al. 2021, "RepVGG" (sequences of linear maps become one for inference); Guo et al. 2020, "ExpandNets",
section 3; maths M17.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Node

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of, entries, shape, size_hint, tensor
from normfx.graph.packing import packed_sources
from normfx.ir.sites import Linear, Pair, Sites
from normfx.rules import centring, defer_norm
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols


def merge(outer: Any, inner: Any, bias: Any, shift: Any) -> tuple[Any, Any]:
    """W₂W₁ and W₂b₁ + b₂; for sympy arrays and torch tensors alike."""
    return outer @ inner, outer @ bias + shift


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    a, inner, outer = symbols("a", 2), symbols("W1", d, 2), symbols("W2", 3, d)
    bias, shift = symbols("b1", d), symbols("b2", 3)
    weight, total = merge(outer, inner, bias, shift)
    yield from zip(outer @ (inner @ a + bias) + shift, weight @ a + total, strict=True)


@dataclass(frozen=True, eq=False)
class Merge:
    """A pair, the inner layer of which may be two already: entries, of the weight that it has then."""

    pair: Pair
    entries: int

    @property
    def norms(self) -> tuple[Pair, ...]:
        return (self.pair,)

    @property
    def between(self) -> int:
        """Features between the two layers."""
        return int(shape(self.pair.inner.weight)[0])

    @property
    def product(self) -> int:
        """Entries of W₂W₁."""
        return int(shape(self.pair.outer.weight)[0]) * self.entries // self.between

    @property
    def fewer(self) -> int:
        """Entries of weights, and multiply-adds of each row, that are saved."""
        return self.entries + _entries(self.pair.outer) - self.product


def _entries(layer: Linear) -> int:
    return int(entries(shape(layer.weight)))


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Merge]:
    """Yields pairs in the order of the graph: the third of three layers is compared with what the first two became."""
    merged: dict[Node, int] = {}
    for pair in sites.pairs:
        site = Merge(pair, merged.get(pair.inner.node, _entries(pair.inner)))
        if not any(True for _ in guard(site, so_far)):
            merged[pair.outer.node] = site.product
        yield site


def guard(site: Merge, so_far: SoFar) -> Iterator[Objection]:
    inner, outer = site.pair.inner, site.pair.outer
    nodes = (inner.node, outer.node)
    sizes = f"{site.entries} and {_entries(outer)} entries, {site.product} in the product"
    if site.fewer <= 0:
        yield "no_gain", sizes, nodes
    copied = {leaf.node for part in so_far.centred for leaf in part.stream.leaves}
    others = (*site.pair.others, *([outer.node] if inner.node in copied else []))
    if others:
        yield "read_between", ", ".join(node.name for node in others), others
    deferred = {linear.node for each in so_far.applied(defer_norm.RULE) for linear, _, _ in each.readers.linears}
    if not deferred.isdisjoint(nodes):
        yield "deferred", inner.node.name, nodes
    packed = tuple(layer.node for layer in (inner, outer) if packed_sources(layer.weight))
    if packed:
        yield "packed_weight", ", ".join(node.name for node in packed), packed
    narrow = tuple(layer.node for layer in (inner, outer) if tensor(layer.weight).dtype in centring.NARROW)
    half = tuple(node for node in nodes if tensor(node).dtype in centring.NARROW)
    if narrow:
        yield "rounded_weight", ", ".join(node.name for node in narrow), narrow
    elif half:
        yield "low_precision", ", ".join(node.name for node in half), half
    rows = size_hint(entries(shape(inner.node)), (inner.node,)) // site.between
    if site.pair.live and 0 < site.fewer * rows < site.product * site.between:
        yield "live_weights", f"{rows} rows, {sizes}", nodes


def cost(site: Merge) -> Cost:
    """What is between is written and read. Afterwards, of live weights, both are read and the product is written."""
    size = tensor(site.pair.outer.weight).element_size()
    live = size * (site.entries + _entries(site.pair.outer) + site.product) if site.pair.live else 0
    return Cost(2 * bytes_of(site.pair.inner.node), sympy.Integer(live))


def rewrite(site: Merge, edit: Edit) -> None:
    edit.merge(site.pair)


class _Two(nn.Module):
    """A norm, two linear layers with `width` features between, and what `tap` puts next to them."""

    codes: torch.Tensor

    def __init__(self, tap: str = "", width: int = 6) -> None:
        super().__init__()
        self.tap = tap
        self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, width), nn.Linear(width, 3)
        self.register_buffer("codes", torch.arange(3 * width, dtype=torch.int8).reshape(3, width))

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.two(self.one(self.norm(x)))
        between = self.one(self.norm(x))
        if self.tap == "packed":
            return nn.functional.linear(between, self.codes.to(x.dtype) * 0.1)
        out = self.two(between)
        return (out, between) if self.tap == "returned" else out


def _input(rows: int = 64) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, rows // 2, 16, generator=torch.Generator().manual_seed(0)),)


RULE = Rule(
    name="merge_linears",
    formula="W₂(W₁a + b₁) + b₂ == (W₂W₁)a + (W₂b₁ + b₂)",
    source="Ding et al. 2021; maths M17",
    codes={
        "no_gain": Code(
            "the product of the two weights has as many entries as both together, or more",
            "none needed: the layers stay two",
        ),
        "read_between": Code("something else reads what is between the two layers", "none needed: the layers stay two"),
        "deferred": Code(
            "a norm is deferred into the first layer",
            "leave the norm: options={'rules': 'default,-defer_norm'}",
        ),
        "packed_weight": Code(
            "a weight is stored packed, as integers or floats of 8 bits", "none needed: the layers stay two"
        ),
        "rounded_weight": Code(
            "a weight is stored in half precision: the product would have to be rounded again",
            "keep the weights in float32",
        ),
        "low_precision": Code(
            "the layers compute in half precision, which would round the product and its bias once more",
            "none needed: the layers stay two",
        ),
        "live_weights": Code(
            "the product of the weights would be computed in every call, and for so few rows that costs more than it "
            "saves",
            "run inference under torch.no_grad(), with options={'fold': 'auto'}; in an exported program, with 'frozen'",
        ),
    },
    identity=identity,
    mistake=("merge_linears.merge", lambda outer, inner, bias, shift: (outer @ inner, outer @ bias)),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    example=Example("two layers", _Two, _input),
    counterexamples=(
        Example("a narrow layer between", lambda: _Two(width=1), _input, "no_gain"),
        Example("returned", lambda: _Two("returned"), _input, "read_between"),
        Example(
            "deferred norm",
            _Two,
            _input,
            "deferred",
            options={"rules": "default,+defer_norm,+merge_linears", "defer_means": "small"},
        ),
        Example("packed", lambda: _Two("packed"), _input, "packed_weight"),
        Example("half precision", lambda: _Two().bfloat16(), lambda: (_input(64)[0].bfloat16(),), "rounded_weight"),
        Example("autocast", lambda: _Two("autocast"), _input, "low_precision"),
        Example("few rows in training", _Two, lambda: _input(2), "live_weights", fold="auto"),
    ),
)
