"""What pre_rms_norm and linear_norm share: deciding and centring one stream.

Costs are counted in bytes, pass by pass. On a CPU a LayerNorm reads a row for its mean, for its variance and to
normalise it, and an RMSNorm saves the first; a GPU reads it once for either (device.py), so that there centring pays
only where it is free. Centring an activation while the model runs reads it for the mean and writes the difference;
for looked-up embedding rows and rows that a norm emits, the write is their own, unless others read the original too.
Folded weights are free where they are kept. Where they are live, for their gradients, every call reads and writes them,
and so does its backward pass: it takes many rows to pay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import networkx
import sympy
import torch
from torch.fx import Node

from normfx.ir.graph import bytes_of, entries, op_name, shape, size_hint, tensor, total
from normfx.ir.sites import Leaf, Norm, Stream
from normfx.recognize.flow import LINEARS
from normfx.rules.device import device_costs
from normfx.rules.rule import Code, Cost

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
        "a writer's weight is stored packed, as integers or floats of 8 bits",
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
        "run inference under torch.no_grad(), train on larger batches, or fold regardless: options={'fold': 'live'}",
    ),
}

NARROW = (torch.bfloat16, torch.float16)

LIVE_PASSES = 5
"""Passes over a weight that is centred in every call: three forward (ops.center takes two means), two backward. The
predicted break-even is twelve rows a feature in a transformer (ViT at 8 rows a feature: 0.98 of Inductor's speed)."""

LIVE_LAUNCHES = 3
"""Kernels that a GPU starts for a weight that is centred in every call, forward and backward."""


def pieces(stream: Stream) -> Iterator[Stream]:
    """The part of a stream that pays to centre, and the rest.

    Each norm brings what an RMSNorm saves and needs all leaves it is made of, each of which has its price once: the
    best choice is a maximum closure ("project selection"), found as a minimum cut (Picard 1976). Ties are taken.
    """
    if stream.obstacle or not any(leaf.explicit or leaf.obstacle or _live(leaf, stream) for leaf in stream.leaves):
        yield stream
        return
    network = networkx.DiGraph()
    rank = 2 * len(stream.norms)  # breaks ties in favour of centring
    for norm in stream.norms:
        saved = _saved(norm) * _hint(bytes_of(norm.input), norm.input)
        network.add_edge("source", norm, capacity=rank * saved + 1)
    for reader, operands in stream.reads.items():
        for operand in operands:
            if not isinstance(operand, Leaf) or operand.explicit or operand.obstacle or _live(operand, stream):
                network.add_edge(reader, operand)
    for leaf in stream.leaves:
        if leaf.obstacle:
            network.add_edge(leaf, "sink")
        elif leaf.explicit or _live(leaf, stream):
            network.add_edge(leaf, "sink", capacity=rank * _hint(_price(leaf, stream), leaf.node))
    chosen: list[Norm] = []
    if "sink" in network:
        _, (kept, _) = networkx.minimum_cut(network, "source", "sink")
        chosen = [norm for norm in stream.norms if norm in kept]
    if chosen:
        yield stream.part(chosen)
    rest = [norm for norm in stream.norms if norm not in chosen]
    if rest:
        paid = {leaf.node for leaf in stream.part(chosen).leaves}
        unpaid = stream.part(rest)
        yield replace(unpaid, leaves=tuple(leaf for leaf in unpaid.leaves if leaf.node not in paid), left=True)


def cost(stream: Stream) -> Cost:
    """Of passes over the rows of norm inputs, over centred leaves and over live weights."""
    before = total(device_costs(norm.input).layer_norm * bytes_of(norm.input) for norm in stream.norms)
    saved = total(_saved(norm) * bytes_of(norm.input) for norm in stream.norms)
    return Cost(before, before - saved + _total(stream, stream.leaves))


def _saved(norm: Norm) -> int:
    """Passes over the rows that an RMSNorm saves."""
    costs = device_costs(norm.input)
    return costs.layer_norm - costs.rms_norm


def _total(stream: Stream, leaves: Iterable[Leaf]) -> sympy.Expr:
    return total(_price(leaf, stream) for leaf in leaves if not leaf.obstacle)


def _price(leaf: Leaf, stream: Stream) -> sympy.Expr:
    if leaf.explicit:
        inside = leaf.alone and leaf.kind in ("norm", "embedding")  # a norm itself emits centred rows (M9)
        return (1 if inside else 2) * bytes_of(leaf.node)
    rows = op_name(leaf.node) == "aten::embedding"  # of a table, at positions that are known: the lookup writes them
    passes, launches = (1, 1) if rows else (LIVE_PASSES, LIVE_LAUNCHES)
    return total(passes * bytes_of(node) + launches * device_costs(node).launch for node in _live(leaf, stream))


def _live(leaf: Leaf, stream: Stream) -> tuple[Node, ...]:
    """The weights behind a leaf that would be centred in every call."""
    behind = leaf.linear.all_input_nodes if leaf.kind == "scaled" and leaf.linear is not None else [leaf.node]
    return tuple(node for node in behind if node in stream.live)


def _hint(expr: sympy.Expr, node: Node) -> int:
    return size_hint(expr, (node,))


def guard(stream: Stream) -> Iterator[tuple[str, str, tuple[Node, ...]]]:
    """Objections to centring a stream: first what would be wrong, then what would not pay."""
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
    price = cost(stream)
    if blocked or (_pays(price, stream) and not stream.left):
        return
    explicit = [leaf for leaf in stream.leaves if leaf.explicit]
    weights = [weight for leaf in stream.leaves for weight in _live(leaf, stream)]
    live = _total(stream, set(stream.leaves) - set(explicit))
    if not explicit or _pays(Cost(price.before, price.after - live), stream):
        size = size_hint(total(entries(shape(w)) for w in weights), _nodes(stream))
        rows = size_hint(total(entries(shape(norm.input)) for norm in stream.norms), _nodes(stream))
        yield "live_weights", f"{len(weights)} weights of {size} entries, {rows} normalised", tuple(weights)
        return
    raw = [leaf for leaf in explicit if leaf.kind == "raw"]
    others = [leaf for leaf in explicit if leaf.kind != "raw"]
    if raw:
        details = ", ".join(f"{leaf.node.name} is read by {_observer(leaf).name}" for leaf in raw)
        yield "observed", details, tuple(node for leaf in raw for node in (leaf.node, _observer(leaf)))
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
    return not inside and leaf.kind not in ("centred", "scaled") and tensor(leaf.node).dtype in NARROW


def _pays(price: Cost, stream: Stream) -> bool:
    return size_hint(price.after, _nodes(stream)) <= size_hint(price.before, _nodes(stream))


def _observer(leaf: Leaf) -> Node:
    return leaf.observer or leaf.node


_LEAF_TEXT = {
    "embedding": "embedding rows",
    "norm": "output of a norm, which has a mean",
    "value": "an activation or graph input",
}


def _nodes(stream: Stream) -> tuple[Node, ...]:
    return (*(n.input for n in stream.norms), *(leaf.node for leaf in stream.leaves if not leaf.obstacle))


def rewrite(stream: Stream, edit: Any) -> None:
    """Centre every leaf and make the stream's norms RMSNorms (M1, M2, M11, M12)."""
    centres = edit.centres.setdefault(stream.norms, [])
    for leaf in stream.leaves:
        if leaf.kind == "scaled":
            edit.fold_output_scale(leaf.linear, leaf.scale, leaf.node)
            centres += edit.center_writer(leaf.linear, leaf.axis)
        elif leaf.kind == "parameter":
            centres += edit.center_operand(leaf.node, leaf.axis, leaf.users)
        elif leaf.kind != "centred":
            centres += edit.center_value(leaf.node, leaf.axis, leaf.users)
    for node, name in stream.dropped:
        edit.drop_term(node, name)
    for norm in stream.norms:
        edit.norm(norm).centred = True
