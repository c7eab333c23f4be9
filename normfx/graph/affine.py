"""γ and β of steps that scale and shift each feature, as values in a graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from normfx.graph.calls import add_call
from normfx.ir.affine import Step

aten = torch.ops.aten


def composed(graph: Graph, steps: Iterable[Step], place: Node) -> tuple[Node | None, Node | None]:
    """γ and β of some steps, computed where the graph inserts; None for 1 and 0."""
    gamma: Node | None = None
    beta: Node | None = None
    for op, operand, alpha in ((step.op, step.operand, step.alpha) for step in steps):
        if op != "add":
            call = aten.mul.Tensor if op == "mul" else aten.div.Tensor
            beta = beta and add_call(graph, call, (beta, operand), place)
            first = operand if op == "mul" else add_call(graph, aten.reciprocal.default, (operand,), place)
            gamma = add_call(graph, call, (gamma, operand), place) if gamma else first
        elif beta is not None:
            beta = add_call(graph, aten.add.Tensor, (beta, operand), place, alpha=alpha)
        else:
            beta = operand if alpha == 1 else add_call(graph, aten.mul.Tensor, (operand, alpha), place)
    return gamma, beta
