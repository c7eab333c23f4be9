"""Linears and convolutions by weights of parameters, with sizes that are known."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from normfx.compat.distributed import is_distributed
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, is_one, op_name, shape, value
from normfx.ir.sites import Linear
from normfx.recognize.readers import convolution, of_parameters, sums_all


def layer(node: Node, facts: Facts) -> Linear | None:
    """The node as a linear with a matrix, or a convolution of a batch, not transposed."""
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
        or not of_parameters(found, facts.parameters)
    ):
        return None
    sizes = shape(found.weight)
    ranks = len(sizes) == 2 if found.groups == 0 else len(shape(node)) == len(sizes)
    return found if ranks and all(isinstance(size, int) and size > 0 for size in sizes) else None


def is_pointwise(outer: Linear) -> bool:
    """Whether each entry that it computes is made of the features at one place."""
    if outer.groups == 0:
        return True
    stride: Any = arguments(outer.node)["stride"]
    steps = stride if isinstance(stride, list | tuple) else [stride]
    return sums_all(outer.node) and all(map(is_one, shape(outer.weight)[2:])) and all(step == 1 for step in steps)
