"""Linears and convolutions that read another one with nothing between."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normfx.graph.barriers import regions
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, occurrences, op_name, tensor
from normfx.graph.recompute import region_of
from normfx.ir.sites import Linear, Pair
from normfx.recognize.layers import is_pointwise, layer


def find_pairs(facts: Facts) -> Iterator[Pair]:
    """One for each linear, or convolution with a kernel of one entry, whose input is the output of another linear or
    convolution, in the same mode and region, both with weights and biases of parameters."""
    where = regions(facts.graph)
    for node in facts.graph.nodes:
        outer = _layer(node, facts)
        inner = None if outer is None or not is_pointwise(outer) else _layer(outer.value, facts)
        if outer is None or inner is None or facts.written & {inner.value, inner.node, outer.node}:
            continue
        if (outer.groups > 0) != (inner.groups > 0) or occurrences(node, inner.node) != 1:
            continue
        if where[inner.node] != where[node] or region_of(inner.node) != region_of(node):
            continue
        late = [vector for vector in (outer.weight, outer.bias) if vector is not None]
        devices = {tensor(part).device for part in (inner.weight, *late)}
        if len(devices) > 1 or not all(facts.order.can_lift(vector, inner.node) for vector in late):
            continue
        others = tuple(user for user in inner.node.users if user is not node and not _reads_other_size(user, inner))
        live = not facts.composed_live.isdisjoint((inner.weight, *late, *([inner.bias] if inner.bias else [])))
        yield Pair(inner, outer, others, live)


def _reads_other_size(user: Node, inner: Linear) -> bool:
    """Whether it reads a size of the inner layer's result that the outer one's has too."""
    if op_name(user) != "aten::sym_size.int":
        return False
    ndim = tensor(inner.node).ndim
    return bool(arguments(user)["dim"] % ndim != (ndim - 1 if inner.groups == 0 else 1))


def _layer(node: Node, facts: Facts) -> Linear | None:
    """The node as a layer whose channels are one group."""
    found = layer(node, facts)
    return found if found is not None and found.groups <= 1 else None
