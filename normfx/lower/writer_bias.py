"""The bias of the linear layer that writes a branch, added by the kernel of the residual add and norm.

    s = (W·h + b) + residual,  y = norm(s)

The gradient of b is the sum of ds over rows. Backward of the norm has ds in registers; the derivative of the linear
layer is a reduction that reads ds from memory once more. With b among the kernel's operands it comes out of backward.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from normfx.graph.calls import add_call
from normfx.graph.nodes import arguments, op_name, shape

_VIEWS = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view"})


class Written(NamedTuple):
    """value: what a linear layer with this bias writes; views: what lies between, from the value back."""

    value: Node
    linear: Node
    bias: Node
    views: tuple[Node, ...]


@dataclass(frozen=True)
class WriterBiases:
    """modes: of the nodes, whether gradients are recorded; mutated: values that are written in place; trained: the
    parameters that want a gradient."""

    modes: Mapping[Node, bool]
    mutated: Container[Node]
    trained: Container[Node]

    def of(self, x: Node) -> Written | None:
        """The linear layer with a trained bias that writes x, recording gradients and for one reader alone; views
        between keep rows. None if there is none."""
        views: list[Node] = []
        node = x
        while op_name(node) in _VIEWS and len(node.users) == 1 and isinstance(node.args[0], Node):
            if shape(node.args[0])[-1:] != shape(x)[-1:]:
                return None
            views.append(node)
            node = node.args[0]
        bias = _bias(node)
        if bias is None or len(node.users) != 1 or not self.modes[node]:
            return None
        if node in self.mutated or bias in self.mutated or tuple(shape(bias)) != tuple(shape(x)[-1:]):
            return None
        wants = bias in self.trained if bias.op in ("placeholder", "get_attr") else self.modes[bias]
        return Written(x, node, bias, tuple(views)) if wants else None


def _bias(node: Node) -> Node | None:
    name = op_name(node)
    if name not in ("aten::linear", "aten::addmm"):
        return None
    given = arguments(node)
    bias = given["bias"] if name == "aten::linear" else given["self"]
    plain = name == "aten::linear" or given["alpha"] == given["beta"] == 1
    return bias if plain and isinstance(bias, Node) else None


def without_bias(written: Written) -> Node:
    """The value that the layer writes without its bias, through the same views, next to it in the graph."""
    graph, given = written.linear.graph, arguments(written.linear)
    with graph.inserting_before(written.linear):
        if op_name(written.linear) == "aten::linear":
            args = (given["input"], given["weight"])
            new = add_call(graph, torch.ops.aten.linear.default, args, written.linear)
        else:
            new = add_call(graph, torch.ops.aten.mm.default, (given["mat1"], given["mat2"]), written.linear)
    for view in reversed(written.views):
        with graph.inserting_before(view):
            new = add_call(graph, view.target, (new, *view.args[1:]), view)
    return new
