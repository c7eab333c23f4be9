"""The M3 table: ops f with f(Px) = P f(x) along a feature axis.

`flow(node, axis, constants)` answers for one node and one feature axis of its output: on which operands is it linear
with coefficients that do not depend on the feature index (`carried`, with the axis inside each operand), and which
additive operands are constant along the axis, so that their centred form is 0 (`dropped`). None: the op is not of that
kind.

A linear's weight and bias count as carried along its output features: W a + b is linear in (W, b), so P W, P b centre
it (M2). The same answer serves readers, which walk it forwards. The table itself stands in the modules imported here,
by kind of op.
"""

from __future__ import annotations

from torch.fx import Node

from normfx.graph.nodes import value
from normfx.ir.sites import Axis
from normfx.recognize import arithmetic, collectives, indexing, mixing  # noqa: F401  # they enter their ops in the table
from normfx.recognize.linears import CONVOLUTIONS, LINEARS, scales_rows
from normfx.recognize.moves import CASTS, RESHAPES
from normfx.recognize.table import PARTS, Constants, Flow

__all__ = ["CASTS", "CONVOLUTIONS", "LINEARS", "PARTS", "RESHAPES", "Constants", "Flow", "flow", "scales_rows"]


def flow(node: Node, axis: Axis, constants: Constants) -> Flow | None:
    """How the feature axis of this node's output flows from its operands; None when the op is not in the table."""
    if not _may_be_float(node):
        return None
    step = constants.step(node, axis)
    if step is None or not all(_may_be_float(operand) for operand, _ in step.carried):
        return None
    return step


def _may_be_float(node: Node) -> bool:
    """Not a tensor of integers; lists of pieces are judged by their pieces."""
    fake = value(node)
    return fake is None or fake.is_floating_point()
