"""Which norms of a stream to centre: the choice that moves the fewest bytes, made once for a graph, before the rules.

Each norm brings what an RMSNorm saves and needs all leaves it is made of, each of which has its price once: the best
choice is a maximum closure ("project selection"), found as a minimum cut (Picard 1976). Ties are taken.

Costs are counted in bytes, pass by pass. On a CPU a LayerNorm reads a row for its mean, for its variance and to
normalise it, and an RMSNorm saves the first; a GPU reads it once for either (device.py), so that there centring pays
only where it is free. Centring an activation while the model runs reads it for the mean and writes the difference;
for looked-up embedding rows and rows that a norm emits, the write is their own, unless others read the original too.
Folded weights are free where they are kept. Where they are live, for their gradients, every call reads and writes them,
and so does its backward pass: it takes many rows to pay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import networkx
import sympy
from torch.fx import Node

from normfx.graph.nodes import bytes_of, op_name, size_hint, total
from normfx.ir.sites import Leaf, Norm, Stream
from normfx.rules.device import device_costs

LIVE_PASSES = 5
"""Passes over a weight that is centred in every call: three forward (ops.center takes two means), two backward. The
predicted break-even is twelve rows a feature in a transformer (ViT at 8 rows a feature: 0.98 of Inductor's speed)."""

LIVE_LAUNCHES = 3
"""Kernels that a GPU starts for a weight that is centred in every call, forward and backward."""


@dataclass(frozen=True, eq=False)
class Part:
    """Norms of a stream that are centred together or not at all.

    stream: what feeds these norms; of a part that was not chosen, the leaves that it would pay for alone
    chosen: whether the cut chose it
    """

    stream: Stream
    chosen: bool = True

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.stream.norms


def cut(streams: Iterable[Stream]) -> tuple[Part, ...]:
    """Cuts each stream into the part that pays to centre, and the rest."""
    return tuple(part for stream in streams for part in _cut(stream))


def _cut(stream: Stream) -> Iterator[Part]:
    if stream.obstacle or not any(leaf.explicit or leaf.obstacle or live(leaf, stream) for leaf in stream.leaves):
        yield Part(stream)
        return
    network = networkx.DiGraph()
    rank = 2 * len(stream.norms)  # breaks ties in favour of centring
    for norm in stream.norms:
        gain = saved(norm) * _hint(bytes_of(norm.input), norm.input)
        network.add_edge("source", norm, capacity=rank * gain + 1)
    for reader, operands in stream.reads.items():
        for operand in operands:
            if not isinstance(operand, Leaf) or operand.explicit or operand.obstacle or live(operand, stream):
                network.add_edge(reader, operand)
    for leaf in stream.leaves:
        if leaf.obstacle:
            network.add_edge(leaf, "sink")
        elif leaf.explicit or live(leaf, stream):
            network.add_edge(leaf, "sink", capacity=rank * _hint(price(leaf, stream), leaf.node))
    chosen: list[Norm] = []
    if "sink" in network:
        _, (kept, _) = networkx.minimum_cut(network, "source", "sink")
        chosen = [norm for norm in stream.norms if norm in kept]
    if chosen:
        yield Part(stream.part(chosen))
    rest = [norm for norm in stream.norms if norm not in chosen]
    if rest:
        paid = {leaf.node for leaf in stream.part(chosen).leaves}
        unpaid = stream.part(rest)
        yield Part(replace(unpaid, leaves=tuple(leaf for leaf in unpaid.leaves if leaf.node not in paid)), chosen=False)


def saved(norm: Norm) -> int:
    """Passes over the rows that an RMSNorm saves."""
    costs = device_costs(norm.input)
    return costs.layer_norm - costs.rms_norm


def price(leaf: Leaf, stream: Stream) -> sympy.Expr:
    """Bytes that are read and written, in every call, to centre a leaf."""
    if leaf.explicit:
        inside = leaf.alone and leaf.kind in ("norm", "embedding")  # a norm itself emits centred rows (M9)
        return (1 if inside else 2) * bytes_of(leaf.node)
    rows = op_name(leaf.node) == "aten::embedding"  # of a table, at positions that are known: the lookup writes them
    passes, launches = (1, 1) if rows else (LIVE_PASSES, LIVE_LAUNCHES)
    return total(passes * bytes_of(node) + launches * device_costs(node).launch for node in live(leaf, stream))


def live(leaf: Leaf, stream: Stream) -> tuple[Node, ...]:
    """The weights of a leaf that would be centred in every call."""
    return tuple(node for node in leaf.weights if node in stream.live)


def _hint(expr: sympy.Expr, node: Node) -> int:
    return size_hint(expr, (node,))
