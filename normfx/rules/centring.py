"""What pre_rms_norm and linear_norm share: the objections to centring a part of a stream, and centring it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sympy
import torch
from torch.fx import Node

from normfx.edit import Edit
from normfx.graph.nodes import bytes_of, entries, op_name, shape, size_hint, tensor, total
from normfx.ir.sites import Leaf, Stream
from normfx.recognize.flow import LINEARS
from normfx.rules.cut import Part, live, price, saved
from normfx.rules.device import device_costs
from normfx.rules.rule import Code, Cost, Objection, SoFar

CODES = {
    "opaque_norm": Code(
        "the norm's own statistics are used elsewhere, or its form is not an exact LayerNorm",
        "compute what is needed from the norm's input, or use nn.LayerNorm",
    ),
    "several_axes": Code(
        "the norm does not run over exactly one dimension of two or more entries",
        "normalise the feature dimension alone",
    ),
    "mutated": Code(
        "a value that enters the stream is written in place or shares memory with one that is",
        "write out-of-place: x = x + y",
    ),
    "packed_weight": Code(
        "a writer's weight is stored packed, as integers or floats of 8 bits: centred it would be unpacked, and "
        "centring what it computes in every call costs more than it saves",
        "none needed: the norm stays a LayerNorm so that the weight stays packed",
    ),
    "rounded_weight": Code(
        "a norm's only input comes from a weight or value stored in half precision: P W would have to be rounded again",
        "keep the weights in float32 and run under autocast",
    ),
    "observed": Code(
        "the stream's mean is read by something other than a LayerNorm over the same features",
        "normalise the value before it is read, or do not return it",
    ),
    "uncentred_input": Code(
        "a value enters the stream that can only be centred while the model runs, and that costs more than it saves",
        "none needed: the norm stays a LayerNorm",
    ),
    "live_weights": Code(
        "folded weights would be computed again in every call, and for so few rows that costs more than it saves",
        "run inference under torch.no_grad(), or train on larger batches; fold regardless: options={'fold': 'live'}; "
        "in an exported program: options={'fold': 'frozen'}",
    ),
}

NARROW = (torch.bfloat16, torch.float16)


def cost(part: Part) -> Cost:
    """Passes over the rows of norm inputs, over centred leaves and over live weights."""
    before = total(device_costs(norm.input).layer_norm * bytes_of(norm.input) for norm in part.norms)
    gain = total(saved(norm) * bytes_of(norm.input) for norm in part.norms)
    return Cost(before, before - gain + _total(part.stream, part.stream.leaves))


def _total(stream: Stream, leaves: Iterable[Leaf]) -> sympy.Expr:
    return total(price(leaf, stream) for leaf in leaves if not leaf.obstacle)


def guard(part: Part, so_far: SoFar) -> Iterator[Objection]:
    return objections(part)


def objections(part: Part) -> Iterator[Objection]:
    """What speaks against centring a part of a stream: first what would be wrong, then what would not pay."""
    stream = part.stream
    if stream.obstacle:
        yield stream.obstacle, stream.detail, tuple(norm.output for norm in stream.norms)
        return
    blocked = [leaf for leaf in stream.leaves if leaf.obstacle]
    for code in dict.fromkeys(leaf.obstacle for leaf in blocked):
        nodes = tuple(leaf.node for leaf in blocked if leaf.obstacle == code)
        yield code, ", ".join(node.name for node in nodes), nodes
    rounded = () if blocked or _sums(stream) else tuple(filter(_rounded, stream.leaves))
    if rounded:
        nodes = tuple(leaf.node for leaf in rounded)
        yield "rounded_weight", ", ".join(node.name for node in nodes), nodes
        return
    whole = cost(part)
    if blocked or (part.chosen and _pays(whole, stream)):
        return
    explicit = [leaf for leaf in stream.leaves if leaf.explicit]
    weights = [weight for leaf in stream.leaves for weight in live(leaf, stream)]
    folds = _total(stream, set(stream.leaves) - set(explicit))
    if not explicit or _pays(Cost(whole.before, whole.after - folds), stream):
        size = size_hint(total(entries(shape(w)) for w in weights), _nodes(stream))
        rows = size_hint(total(entries(shape(norm.input)) for norm in stream.norms), _nodes(stream))
        yield "live_weights", f"{len(weights)} weights of {size} entries, {rows} normalised", tuple(weights)
        return
    packed = [leaf for leaf in explicit if leaf.kind == "packed"]
    if packed:
        yield "packed_weight", ", ".join(leaf.node.name for leaf in packed), tuple(leaf.node for leaf in packed)
        if _pays(Cost(whole.before, whole.after - _total(stream, packed)), stream):
            return
    raw = [leaf for leaf in explicit if leaf.kind == "raw"]
    sharded = [leaf for leaf in explicit if leaf.kind == "sharded" and stream.joins]
    others = [leaf for leaf in explicit if leaf.kind not in ("raw", "packed") and leaf not in sharded]
    if raw:
        details = ", ".join(f"{leaf.node.name} is read by {_observer(leaf).name}" for leaf in raw)
        yield "observed", details, tuple(node for leaf in raw for node in (leaf.node, _observer(leaf)))
    if sharded:
        yield "sharded_features", ", ".join(leaf.node.name for leaf in sharded), tuple(leaf.node for leaf in sharded)
    if others:
        details = ", ".join(f"{leaf.node.name} ({_LEAF_TEXT[leaf.kind]})" for leaf in others)
        yield "uncentred_input", details, tuple(leaf.node for leaf in others)


def _sums(stream: Stream) -> bool:
    """Whether values are added on the way: then eager too rounds more often than once before the norm."""
    added = (node for node in stream.axes if op_name(node) not in (*LINEARS, *_JOINS))
    return any(len(set(stream.reads.get(node, ()))) > 1 for node in added)


_JOINS = ("aten::cat", "aten::stack", "aten::concat", "aten::concatenate")


def _rounded(leaf: Leaf) -> bool:
    """Whether the centred form of a leaf is rounded to half precision, which the leaf itself is not again.

    Of a product with λ eager rounds the product; a norm itself emits centred rows. Measured with bfloat16 weights: one
    linear before a norm 1.20 times eager's error, with tanh after it 1.47, an embedding before it 1.39; two linears
    1.14, embedding and block 1.15.
    """
    inside = leaf.kind == "norm" and leaf.alone
    stored = leaf.weights if leaf.block is not None else [leaf.node]
    narrow = any(tensor(node).dtype in NARROW for node in stored)
    return not inside and leaf.kind not in ("centred", "scaled") and narrow


def _pays(bytes_: Cost, stream: Stream) -> bool:
    return size_hint(bytes_.after, _nodes(stream)) <= size_hint(bytes_.before, _nodes(stream))


def _observer(leaf: Leaf) -> Node:
    return leaf.observer or leaf.node


_LEAF_TEXT = {
    "embedding": "embedding rows",
    "norm": "output of a norm, which has a mean",
    "sharded": "rows put together from features that were spread over processes",
    "value": "an activation or graph input",
}


def _nodes(stream: Stream) -> tuple[Node, ...]:
    return (*(n.input for n in stream.norms), *(leaf.node for leaf in stream.leaves if not leaf.obstacle))


def rewrite(part: Part, edit: Edit) -> None:
    """Centre every leaf and make the norms RMSNorms (M1, M2, M11, M12)."""
    for leaf in part.stream.leaves:
        edit.center(leaf)
    for node, name in part.stream.dropped:
        edit.drop_term(node, name)
    for norm in part.norms:
        edit.norm(norm).centred = True
