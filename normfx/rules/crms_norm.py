"""crms_norm: a centred stream stored in d − 1 entries a row.

    x = Σ P writers(a), 1ᵀx = 0
    W LN(x) + c  ==  W' CRMS(u) + c      u = x without xₚ = −Σu,  W'ᵢ = Wᵢ − Wₚ                 "drop"
    W LN(x) + c  ==  (WQ) RMS_d(v) + c   v = Qᵀx,  Q of d rows and d − 1 columns, QᵀQ = I, 1ᵀQ = 0     "orthonormal"

    CRMS(u) = u / sqrt((Σu² + (Σu)²)/d + ε),    RMS_d(v) = v / sqrt(Σv²/d + ε)

Writers emit the d − 1 entries, readers take them; γ and β are folded into the readers before. "drop" is that of
"Pre-RMSNorm and Pre-CRMSNorm Transformers" (Jiang et al. 2023), section 3.2, where the last entry goes. Here p is
chosen (storage.py). "orthonormal" keeps lengths: no entry carries the rounding errors of all others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Node

from normfx.edit import Edit
from normfx.edit.resize import reads_size, resizable
from normfx.graph.nodes import bytes_of, entry_readers, extent, op_name, total
from normfx.ir.sites import Axis, Norm, Readers, Sites, Stream
from normfx.recognize.axes import is_whole
from normfx.recognize.flow import LINEARS
from normfx.rules import algebra, centring, fold_affine
from normfx.rules.cut import Part
from normfx.rules.rule import Code, Cost, Example, Objection, Rule, SoFar, Symbols
from normfx.rules.storage import BASES, WIDTHS, storage


@dataclass(frozen=True, eq=False)
class Compressed:
    """A part of a stream with the readers of its norms."""

    part: Part
    readers: tuple[Readers, ...]

    @property
    def stream(self) -> Stream:
        return self.part.stream

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.part.norms

    @property
    def size(self) -> int:
        return self.stream.norms[0].size

    @property
    def values(self) -> Mapping[Node, Axis]:
        """Every value that gets another width: inside the stream, after its norms, and between a writer and its λ."""
        inside = dict(self.stream.axes)
        for readers in self.readers:
            inside.update(readers.axes)
        for leaf in self.stream.leaves:
            inside.update(leaf.path)
        return inside


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    """The output, and its derivative by every parameter, of a writer, a skip, γ, β and a reader, in both bases.

    The output is N/√S + c. By the quotient rule its derivatives are equal where those of N·S − … are, polynomials.
    """
    x, weight, bias = symbols("x", d), symbols("W", d), symbols("b", d)
    gamma, beta, read = symbols("g", d), symbols("h", d), symbols("R", d)
    a, eps = symbols("a", 1)[0], symbols("eps", 1)[0]
    parameters = [a, *x, *weight, *bias, *gamma, *read] if d == 2 else []
    plain = read * (gamma * algebra.layer_norm(x + weight * a + bias, eps) + beta)
    row = algebra.center(x) + algebra.center(weight) * a + algebra.center(bias)
    before = (read * gamma * row).sum(), (row * row).sum() / d + eps
    for basis, channel in itertools.product(("drop", "orthonormal"), sorted({0, d - 1})):
        stored = algebra.compress(row, basis, channel)
        folded = algebra.compress_input(read * gamma, basis, channel)
        norm = algebra.crms_norm if basis == "drop" else algebra.rms_norm_of
        yield plain.sum(), (folded * norm(stored, eps, d)).sum() + (read * beta).sum()
        squares = (stored * stored).sum() + (stored.sum() ** 2 if basis == "drop" else 0)
        after = (folded * stored).sum(), squares / d + eps
        for p in parameters:
            yield tuple(sympy.diff(n, p) * root - n * sympy.diff(root, p) / 2 for n, root in (before, after))


def candidates(sites: Sites, so_far: SoFar) -> Iterable[Compressed]:
    for part in so_far.parts:
        yield Compressed(part, tuple(sites.readers[norm] for norm in part.norms if norm in sites.readers))


def guard(site: Compressed, so_far: SoFar) -> Iterator[Objection]:
    """Objections to centring the stream and to folding γ and β, unless that is decided, and to another width."""
    objections = [] if site.part in so_far.centred else list(centring.objections(site.part))
    if objections:
        yield "not_centred", ", ".join(dict.fromkeys(code for code, _, _ in objections)), objections[0][2]
        return
    places = [*site.values.items(), *((leaf.node, leaf.axis) for leaf in site.stream.leaves)]
    split = tuple(node for node, axis in places if not is_whole(node, axis))
    split += tuple(leaf.node for leaf in site.stream.leaves if leaf.block is not None)
    if split:
        yield "split_features", ", ".join(node.name for node in split), split
        return
    folded = so_far.applied(fold_affine.RULE)
    over = tuple(linear.node for readers in site.readers for linear, _, _ in readers.linears if linear.groups)
    if over:  # a convolution over the channels keeps their number
        yield "reader_not_linear", ", ".join(node.name for node in over), over
    for readers in site.readers:
        if readers not in folded:
            yield from _objections(readers)
        lookups = tuple(linear.lookup for linear, _, _ in readers.linears if linear.lookup is not None)
        if lookups:
            yield "fixed_width", ", ".join(node.name for node in lookups), lookups
    written = {norm.output for norm in site.stream.norms}  # computed at the new width
    rigid = [n for n, axis in site.values.items() if n not in written and not resizable(n, axis, site.size)]
    reads = [user for node, axis in site.values.items() for user in node.users if reads_size(user, axis)]
    found = (*rigid, *reads, *_wide(site), *_outside(site))
    if found:
        yield "fixed_width", ", ".join(node.name for node in found), found


def _wide(site: Compressed) -> Iterator[Node]:
    """Ops with a coefficient, an index or a dropped term that has an entry for each feature, all the same."""
    inside = {*site.values, *(leaf.node for leaf in site.stream.leaves)}
    written = {norm.output for norm in site.stream.norms}
    for node, axis in site.values.items():
        val = node.meta["val"]
        if node in written or op_name(node) in LINEARS or not isinstance(val, torch.Tensor):
            continue
        others = [o.meta["val"] for o in node.all_input_nodes if o not in inside]
        places = [(v, axis.dim - val.ndim + v.ndim) for v in others if isinstance(v, torch.Tensor)]
        if any(dim >= 0 and extent(v.shape[dim]) == site.size for v, dim in places):
            yield node


def _outside(site: Compressed) -> Iterator[Node]:
    """Readers of the stream's values that keep the width: they feed norms for which centring did not pay."""
    inside = {*site.values, *(node for norm in site.stream.norms for node in norm.nodes)}
    for node in site.stream.axes:
        yield from (user for user in entry_readers(node) if user not in inside)


def _objections(readers: Readers) -> Iterator[Objection]:
    if readers.others:
        yield "reader_not_linear", ", ".join(node.name for node in readers.others), readers.others
        return
    for code, found in (
        ("packed_weight", fold_affine.packed_readers(readers)),
        ("rounded_weight", fold_affine.narrow_readers(readers)),
    ):
        if found:
            yield code, ", ".join(node.name for node in found), found
    for code, detail, nodes in fold_affine.objections(readers):
        if code not in ("no_affine", "packed_weight", "rounded_weight"):
            yield "affine_stays", detail or code, nodes


def cost(site: Compressed) -> Cost:
    """One pass over every value of the stream, of d and of d − 1 entries a row."""
    before = total(bytes_of(node) for node in site.values if isinstance(node.meta["val"], torch.Tensor))
    return Cost(before, before * (site.size - 1) / site.size if site.size else before)


def rewrite(site: Compressed, edit: Edit) -> None:
    if not all(edit.norm(norm).centred for norm in site.part.norms):
        centring.rewrite(site.part, edit)
    for readers in site.readers:
        norm = readers.norm
        if edit.norm(norm).affine and (norm.weight is not None or norm.bias is not None):
            fold_affine.rewrite(readers, edit)
    basis, width = edit.options["crms_basis"], edit.options["crms_width"]
    stored = storage(site.stream, site.readers, basis, width, edit.values)
    edit.compress(site.stream, site.readers, site.values, stored)


class _Block(nn.Module):
    """Two pre-LN residual branches over an embedding, read through a final norm."""

    packed: torch.Tensor

    def __init__(self, tap: str = "", width: int = 8) -> None:
        super().__init__()
        self.tap = tap
        self.register_buffer("packed", torch.arange(3 * width, dtype=torch.int8).reshape(3, width))
        self.table = nn.Embedding(10, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up1, self.down1, self.head = nn.Linear(width, 6), nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        if self.tap == "raw":
            return self.head(self.norm1(x)), x.clone().mul_(2.0)
        x = x + self.down1(torch.relu(self.up1(self.norm1(x))))
        if self.tap == "fixed":
            x = x.unflatten(1, (2, 2)).flatten(1, 2)
        y = self.norm2(x)
        if self.tap == "shared":
            return self.head(y), self.head(self.norm1(x))
        weight = self.packed.to(y.dtype) * 0.1 if self.tap == "packed" else self.head.weight
        out = nn.functional.linear(y, weight, self.head.bias)
        return {"activation": (out, torch.tanh(y)), "observed": (out, x)}.get(self.tap, out)


class _Heads(nn.Module):
    """A projection, each head normalised and read."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.norm, self.read = nn.Linear(6, 8), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self.norm(self.project(x).unflatten(-1, (2, 4))))


def _ids() -> tuple[torch.Tensor, ...]:
    return (torch.arange(8).reshape(2, 4),)


def _half(model: nn.Module) -> nn.Module:
    return model.bfloat16()


RULE = Rule(
    name="crms_norm",
    formula="W LN(x) == W' CRMS(u), or (WQ) RMS(Qᵀx)",
    source="Jiang et al. 2023, section 3.2",
    codes={
        "not_centred": Code(
            "the stream is not centred, so no entry of a row can be computed from the others",
            "see the refusal of pre_rms_norm or linear_norm",
        ),
        "split_features": Code(
            "in some op of the stream the features share a dimension with something else",
            "keep the features in a dimension of their own",
        ),
        "reader_not_linear": Code(
            "an op other than a linear over the norm's features reads its output, which needs all d entries",
            "none needed: the stream keeps its width",
        ),
        "affine_stays": Code(
            "γ and β cannot be folded into the norm's readers, and they act on d entries",
            "see the refusal of fold_affine",
        ),
        "packed_weight": fold_affine.PACKED,
        "rounded_weight": fold_affine.ROUNDED,
        "fixed_width": Code(
            "an op in the stream takes a size from elsewhere, or the width itself is read",
            "write sizes as numbers, or −1, in view, reshape and expand",
        ),
    },
    identity=identity,
    mistake=("algebra.compress_input", lambda w, basis, channel: w[1:]),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    example=Example("block", _Block, _ids),
    counterexamples=(
        Example("observed", lambda: _Block("observed"), _ids, "not_centred"),
        Example("heads", _Heads, lambda: (torch.randn(3, 6),), "split_features"),
        Example("nonlinear reader", lambda: _Block("activation"), _ids, "reader_not_linear"),
        Example("shared reader", lambda: _Block("shared"), _ids, "affine_stays"),
        Example("packed reader", lambda: _Block("packed"), _ids, "packed_weight"),
        Example("half precision", lambda: _half(_Block()), _ids, "rounded_weight"),
        Example("unflatten", lambda: _Block("fixed"), _ids, "fixed_width"),
    ),
    default=False,
    makes_rms_norms=True,
    options={"crms_basis": BASES, "crms_width": WIDTHS},
)
