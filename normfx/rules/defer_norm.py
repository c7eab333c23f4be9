"""defer_norm: a norm read by linears alone becomes one factor for each row of what they compute.

    W LN(x) + c  ==  rstd·(Ŵ x) + (Wβ + c)        Ŵ = W diag(γ) P
    W RMS(x) + c ==  rstd·(W diag(γ) x) + c       likewise for a LayerNorm whose input another rule has centred

The normalised rows are never written. rstd is computed from x itself, around its mean, as the norm computes it; x needs
no property on real numbers.

In floating point x must not have a large mean: Ŵ x sums products as large as |mean| and takes most of the sum away
again, where a LayerNorm subtracts the mean first. Error against float64 as a multiple of eager's, float32, 512
features: 1.0 up to mean/σ = 0.5, 1.2 at 1, 2.3 at 3, 3.6 at 10, 6.3 at 1000; and rows without variance keep rounding
errors that are divided by √ε, where a LayerNorm gives β. That x has a small mean can be proved of centred rows alone.
So a LayerNorm that keeps its mean is deferred only where a user says that means are small: defer_means="small". An
RMSNorm subtracts nothing (docs/design-notes.md).

Source: maths M8; for RMSNorms "Flash normalization" (Graef et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from normfx.edit import Edit
from normfx.graph.nodes import is_row_major, op_name, shape, tensor
from normfx.graph.recompute import region_of
from normfx.ir.sites import Linear, Norm, Readers, Sites
from normfx.recognize.axes import is_whole
from normfx.recognize.readers import passes_rows
from normfx.rules import algebra, centring, crms_norm, fold_affine
from normfx.rules.deferral import Deferred, cost, price_objections
from normfx.rules.rule import Code, Example, Objection, Rule, SoFar, Symbols

MEANS = ("unknown", "small")
"""What is known of the means of rows that a LayerNorm reads. "small": not larger than about their deviation."""


def fold(weight: Any, gamma: Any) -> Any:
    """Ŵ = W diag(γ) P, for arrays of symbols and tensors alike."""
    scaled = weight * gamma
    return algebra.center(scaled.T).T


def identity(symbols: Symbols, d: int) -> Iterable[tuple[Any, Any]]:
    x, weight, bias = symbols("x", d), symbols("W", 2, d), symbols("c", 2)
    gamma, beta, eps = symbols("gamma", d), symbols("beta", d), symbols("eps", 1)[0]
    rstd = 1 / sympy.sqrt((algebra.center(x) ** 2).sum() / sympy.Integer(d) + eps)
    deferred = rstd * (fold(weight, gamma) @ x) + (weight @ beta + bias)
    yield from zip(weight @ (gamma * algebra.layer_norm(x, eps) + beta) + bias, deferred, strict=True)
    plain = (weight * gamma) @ x / sympy.sqrt((x * x).sum() / sympy.Integer(d) + eps) + bias
    yield from zip(weight @ (gamma * algebra.rms_norm(x, eps)) + bias, plain, strict=True)


def candidates(sites: Sites, so_far: SoFar) -> Iterator[Deferred]:
    centred = {norm for part in so_far.centred for norm in part.norms}
    compressed = [node for site in so_far.applied(crms_norm.RULE) for node in site.values]
    folded, writers = so_far.applied(fold_affine.RULE), {}
    for batch_norm in sites.batch_norms:
        if batch_norm.writer is not None:
            writers[batch_norm.writer.node] = batch_norm.norm.output
    for norm, readers in sites.readers.items():
        if not (readers.linears or readers.others or readers.packed):
            continue
        linears = [linear.node for linear, _, _ in readers.linears]
        resized = not {norm.output, *linears}.isdisjoint(compressed)
        followers = tuple(writers[node] for node in linears if node in writers)
        plain = norm.kind == "RMSNorm" or norm in centred
        yield Deferred(readers, plain, resized, readers in folded, followers)


def guard(site: Deferred, so_far: SoFar) -> Iterator[Objection]:
    norm, readers = site.norm, site.readers
    if norm.obstacle:
        yield "opaque_norm", norm.obstacle, (norm.output,)
        return
    if norm.axis is None:
        yield "several_axes", f"dimensions {norm.dims} of {norm.input.name}", (norm.output,)
        return
    outputs = tuple(node for node in readers.others if node.op == "output")
    if outputs:
        yield "returned", "", outputs
    others = tuple(node for node in readers.others if node.op != "output")
    others += tuple(linear.node for linear, _, _ in readers.linears if _is_other(linear, readers))
    if others:
        yield "reader_not_linear", ", ".join(node.name for node in others), others
    if outputs or others:
        return
    objections = [*_places(site), *_values(site, so_far)]
    yield from objections
    if not objections:
        yield from price_objections(site)


def _is_other(linear: Linear, readers: Readers) -> bool:
    """Whether a reader is not rows times a matrix of parameters: a convolution, an einsum, a weight made of data."""
    return linear.groups > 0 or linear.unusual or linear.weight in readers.computed


def _places(site: Deferred) -> Iterator[Objection]:
    """Objections to moving the factor of a row past the product, or to reading x for the normalised rows."""
    norm, readers = site.norm, site.readers
    changed = tuple(node for node in readers.path if not _moves(node)) + tuple(
        node for node, axis in readers.axes.items() if not is_whole(node, axis)
    )
    if changed:
        yield "rows_changed", ", ".join(dict.fromkeys(node.name for node in changed)), changed
    linears = [linear.node for linear, _, _ in readers.linears]
    grouped = tuple(linear.node for linear, _, _ in readers.linears if len(shape(linear.weight)) != 2)
    if grouped:
        yield "grouped_reader", ", ".join(node.name for node in grouped), grouped
    apart = tuple(node for node in linears if region_of(node) != region_of(norm.output))
    if apart:
        yield "checkpointed", ", ".join(node.name for node in apart), apart
    if not (is_row_major(tensor(norm.input)) and is_row_major(tensor(norm.output))):
        yield "strided", norm.input.name, (norm.input,)
    if site.compressed:
        yield "compressed", norm.name, (norm.output,)
    if site.followers:
        yield "batch_norm", ", ".join(node.name for node in site.followers), site.followers


def _moves(node: Node) -> bool:
    """Whether every row that comes out is a row that went in."""
    return passes_rows(node) and op_name(node) not in MIXES


MIXES = frozenset(
    {"aten::dropout", "aten::mean.dim", "aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::type_as"}
)
"""Ops that pass γ and β on, but not the factor of a row."""


def _values(site: Deferred, so_far: SoFar) -> Iterator[Objection]:
    """What folding would store twice or unpacked, and what would be rounded otherwise than eager does."""
    norm, readers = site.norm, site.readers
    if readers.shared and site.folds:
        yield "shared_weight", ", ".join(node.name for node in readers.shared), readers.shared
    packed = fold_affine.packed_readers(readers)
    if readers.packed or (packed and site.folds):
        yield "packed_weight", ", ".join(node.name for node in packed), packed
    moved = [node for node in readers.path if isinstance(node.meta["val"], torch.Tensor)]
    linears = [node for linear, _, _ in readers.linears for node in (linear.weight, linear.node)]
    dtypes = {norm.compute_dtype, *(tensor(n).dtype for n in (norm.input, norm.output, *moved, *linears))}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        said = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        yield "low_precision", said, tuple(linear.node for linear, _, _ in readers.linears)
    elif not site.plain and so_far.options.get("defer_means") != "small":
        yield "unknown_mean", norm.input.name, (norm.input,)


def rewrite(site: Deferred, edit: Edit) -> None:
    norm = site.norm
    if edit.norm(norm).affine and (norm.weight is not None or norm.bias is not None):
        fold_affine.rewrite(site.readers, edit)
    edit.defer(site.readers)


DEFERRED = Code(
    "the norm is deferred into the linears that read it", "leave the norm: options={'rules': 'default,-defer_norm'}"
)
"""The code of rules that are decided later and need the norm."""


def deferred(norms: Iterable[Norm], so_far: SoFar) -> tuple[Node, ...]:
    """The outputs of those norms that this rule is applied to."""
    found = {site.norm for site in so_far.applied(RULE)}
    return tuple(norm.output for norm in norms if norm in found)


class _Read(nn.Module):
    """A norm read by two linears and a product of them, or as `tap` says."""

    packed: torch.Tensor

    def __init__(self, tap: str = "", norm_dims: int = 1) -> None:
        super().__init__()
        self.tap = tap
        self.norm = nn.LayerNorm(6 if norm_dims == 1 else (5, 6))
        self.gate, self.read, self.batch_norm = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
        self.stack = nn.Parameter(torch.linspace(-1.0, 1.0, 48).reshape(2, 6, 4))
        self.register_buffer("packed", torch.arange(24, dtype=torch.int8).reshape(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        if self.tap == "statistics":
            y, mean, _ = torch.native_layer_norm(x, [6], self.norm.weight, self.norm.bias, 1e-5)
            return torch.relu(self.gate(y)), mean
        if self.tap == "strided":
            x = x.transpose(0, 1)
        y = checkpoint(self.norm, x, use_reentrant=False) if self.tap == "checkpoint" else self.norm(x)
        if self.tap == "mean of rows":
            y = y.mean(1)
        if self.tap == "experts":
            return torch.relu(torch.bmm(y, self.stack))
        if self.tap == "batch norm":
            return torch.relu(self.batch_norm(self.gate(y.flatten(0, 1))))
        if self.tap == "packed":
            return torch.relu(nn.functional.linear(y, self.packed.to(x.dtype) * 0.1))
        if self.tap == "einsum":
            return torch.relu(torch.einsum("btd,hd->hbt", y, self.gate.weight))
        if self.tap == "wide":
            return self.gate(y)
        out = torch.sigmoid(self.gate(y)) * self.read(y)
        return {"output": (out, y), "activation": (out, torch.tanh(y))}.get(self.tap, out)


class _Shared(nn.Module):
    """One linear after two norms with their own γ and β."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.read = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.read(self.norm1(x))) + torch.relu(self.read(self.norm2(x * x)))


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),)


_SMALL = {"defer_means": "small"}


def _refused(tap: str, code: str) -> Example:
    return Example(tap, lambda: _Read(tap), _input, code, options=_SMALL)


RULE = Rule(
    name="defer_norm",
    formula="W LN(x) + c == rstd·(Ŵx) + (Wβ + c), Ŵ = W diag(γ) P",
    source="Graef et al. 2024 (RMSNorms); maths M8",
    codes={
        "opaque_norm": centring.CODES["opaque_norm"],
        "several_axes": centring.CODES["several_axes"],
        "returned": Code("the graph returns the norm's output", "none needed: the norm stays"),
        "reader_not_linear": Code(
            "an op other than a linear over the norm's features reads its output", "none needed: the norm stays"
        ),
        "rows_changed": Code(
            "between the norm and a linear its rows are averaged, split, dropped out or multiplied",
            "none needed: the norm stays",
        ),
        "grouped_reader": Code(
            "a reader multiplies each row by the matrix of its own group", "none needed: the norm stays"
        ),
        "checkpointed": Code(
            "the norm and a reader belong to different checkpointed regions", "checkpoint both together"
        ),
        "strided": Code(
            "the norm's input does not lie in memory row by row: the products would have to copy it",
            "none needed: the norm stays",
        ),
        "batch_norm": Code(
            "a BatchNorm may be folded into a reader", "leave that rule out: options={'rules': '-fold_batch_norm'}"
        ),
        "compressed": Code(
            "crms_norm stores the rows that the norm reads, or that a reader writes, in fewer entries",
            "none needed: the norm stays",
        ),
        "shared_weight": Code(
            "a reader's weight is shared with a reader of a norm with other γ or β: each would need a copy of it",
            "none needed: the norm stays",
        ),
        "packed_weight": Code(
            "a reader's weight is stored packed, as integers or floats of 8 bits", "none needed: the norm stays"
        ),
        "low_precision": Code(
            "the norm and its readers do not all compute in float32, or all in float64: the product would be rounded "
            "before it is scaled",
            "none needed: the norm stays",
        ),
        "unknown_mean": Code(
            "the norm subtracts the mean of its rows: after the product that costs digits where the mean is large",
            "if no mean is larger than the deviation of its row: options={'defer_means': 'small'}",
        ),
        "no_gain": Code(
            "the pass over what the readers compute costs as much as it saves, or more", "none needed: the norm stays"
        ),
        "live_weights": centring.CODES["live_weights"],
    },
    identity=identity,
    mistake=("defer_norm.fold", lambda weight, gamma: weight * gamma),
    candidates=candidates,
    guard=guard,
    cost=cost,
    rewrite=rewrite,
    default=False,
    options={"defer_means": MEANS},
    summary="{norms} {are} deferred into the linear layers that read them",
    example=Example("gated", _Read, _input, options=_SMALL),
    counterexamples=(
        _refused("statistics", "opaque_norm"),
        Example("two axes", lambda: _Read(norm_dims=2), _input, "several_axes", options=_SMALL),
        _refused("output", "returned"),
        _refused("activation", "reader_not_linear"),
        _refused("einsum", "reader_not_linear"),
        _refused("mean of rows", "rows_changed"),
        _refused("experts", "grouped_reader"),
        _refused("checkpoint", "checkpointed"),
        _refused("strided", "strided"),
        _refused("batch norm", "batch_norm"),
        Example(
            "compressed",
            lambda: nn.Sequential(nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU()),
            lambda: (torch.arange(8).reshape(2, 4),),
            "compressed",
            options={"rules": "default,+crms_norm,+defer_norm"},
        ),
        Example("shared weight", _Shared, _input, "shared_weight", options=_SMALL),
        _refused("packed", "packed_weight"),
        Example(
            "half precision",
            lambda: _Read().bfloat16(),
            lambda: (_input()[0].bfloat16(),),
            "low_precision",
            options=_SMALL,
        ),
        Example("mean", _Read, _input, "unknown_mean"),
        _refused("wide", "no_gain"),
        Example("few rows in training", _Read, _input, "live_weights", fold="auto", options=_SMALL),
    ),
)
