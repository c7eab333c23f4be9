"""Linears and convolutions that read another one with nothing between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from normfx.compat.distributed import is_distributed
from normfx.graph.barriers import regions
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entry_readers, is_one, occurrences, op_name, shape, tensor, value
from normfx.graph.recompute import region_of
from normfx.ir.sites import Linear, Pair
from normfx.recognize.readers import convolution, of_parameters, sums_all


def find_pairs(facts: Facts) -> Iterator[Pair]:
    """One for each linear, or convolution with a kernel of one entry, whose input is the output of another linear or
    convolution, in the same mode and region, both with weights and biases of parameters."""
    where = regions(facts.graph)
    for node in facts.graph.nodes:
        outer = _layer(node, facts)
        inner = None if outer is None or not _is_pointwise(outer) else _layer(outer.value, facts)
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
        others = tuple(user for user in entry_readers(inner.node) if user is not node)
        live = not facts.composed_live.isdisjoint((inner.weight, *late, *([inner.bias] if inner.bias else [])))
        yield Pair(inner, outer, others, live)


def _layer(node: Node, facts: Facts) -> Linear | None:
    """The node as a linear with a matrix, or a convolution whose channels are one group, with sizes that are known."""
    if node in facts.parameters or value(node) is None:
        return None
    if op_name(node) == "aten::linear":
        args = arguments(node)
        found: Linear | None = Linear(node, args["input"], args["weight"], args["bias"], "weight", "bias", 1)
    else:
        found = convolution(node)
    if (
        found is None
        or is_distributed(value(found.weight))
        or found.in_dim != 1
        or found.groups > 1
        or not of_parameters(found, facts.parameters)
    ):
        return None
    sizes = shape(found.weight)
    ranks = len(sizes) == 2 if found.groups == 0 else len(shape(node)) == len(sizes)
    return found if ranks and all(isinstance(size, int) for size in sizes) else None


def _is_pointwise(outer: Linear) -> bool:
    """Whether each entry that it computes is made of the features at one place."""
    if outer.groups == 0:
        return True
    stride: Any = arguments(outer.node)["stride"]
    steps = stride if isinstance(stride, list | tuple) else [stride]
    return sums_all(outer.node) and all(map(is_one, shape(outer.weight)[2:])) and all(step == 1 for step in steps)
