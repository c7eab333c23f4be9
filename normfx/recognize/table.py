"""The registry of the M3 table, and what may be asked about one call in it.

An op stands in the table with a handler, which says on which operands the output depends feature by feature
(`carried`), and which additive operands are constant along the axis (`dropped`). Coefficients, indices and masks have
to be the same for all features: that is proved on the graph, by `Constants`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from normfx.compat.operators import OpOverload, schema
from normfx.graph.nodes import RANDOM, arguments, extent, is_getitem, is_one, op_name, shape, value
from normfx.graph.opaque import APART
from normfx.graph.shards import crossing, has_whole_rows, is_summed
from normfx.ir.sites import Axis
from normfx.recognize.axes import expand_axis


@dataclass(frozen=True)
class Flow:
    """carried: (operand, its axis); dropped: names of schema arguments."""

    carried: tuple[tuple[Node, Axis], ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of an op, its arguments by schema name, and the feature axis of its output."""

    node: Node
    args: dict[str, Any]
    axis: Axis
    constants: Constants

    @property
    def ndim(self) -> int:
        return len(shape(self.node))

    def inside(self, operand: Node) -> Axis | None:
        """The axis in an operand that is broadcast to the output; None where it has one entry along it."""
        return expand_axis(operand, self.ndim, self.axis)

    def constant(self, operand: Any) -> bool:
        """Whether an operand that is broadcast to the output is the same for all features."""
        return self.constants.broadcast(operand, self.ndim, self.axis)

    def broadcast_terms(self, *names: str) -> Flow | None:
        """A sum of operands that are broadcast to the output."""
        return self.terms(*((n, self.inside(self.args[n]) if value(self.args[n]) is not None else None) for n in names))

    def terms(self, *terms: tuple[str, Axis | None]) -> Flow | None:
        """A sum of operands, each with its axis (None: one entry). What is constant along it is dropped; zeros are
        carried: they are centred as they are."""
        carried: list[tuple[Node, Axis]] = []
        dropped: list[str] = []
        for name, inside in terms:
            operand = self.args[name]
            if value(operand) is None:
                if not _is_number(operand):
                    return None
                dropped.append(name)
            elif inside is None or self.constants.alike(operand, inside):
                dropped.append(name)
            else:
                carried.append((operand, inside))
        return Flow(tuple(carried), tuple(dropped)) if carried else None


def _is_number(operand: Any) -> bool:
    """A number that may be dropped: inf and NaN are not, they would no longer spread, nor is what may be one."""
    if isinstance(operand, Node):
        return isinstance(operand.meta.get("val"), (torch.SymInt, torch.SymBool, int))
    return isinstance(operand, (bool, int)) or (isinstance(operand, float) and math.isfinite(operand))


Handler = Callable[[Call], Flow | None]
TABLE: dict[str, Handler] = {}
"""The handlers, by op name."""


def op(*names: str) -> Callable[[Handler], Handler]:
    """Enter ATen ops in the table."""

    def register(handler: Handler) -> Handler:
        for name in names:
            assert "aten::" + name not in TABLE, name
            TABLE["aten::" + name] = handler
        return handler

    return register


def aten(*names: str) -> frozenset[str]:
    return frozenset("aten::" + name for name in names)


PARTS = aten("split.Tensor", "split.sizes", "split_with_sizes", "chunk", "unbind.int", "tensor_split.sections")
"""Ops that return a list of pieces."""


def one(operand: Any, axis: Axis | None) -> Flow | None:
    """The flow of an op that carries a single operand."""
    return None if axis is None or value(operand) is None else Flow(((operand, axis),))


def same_extent(a: Node, b: Node, dim: int) -> bool:
    """Whether two values are known to have the same size in a dimension."""
    return bool(extent(shape(a)[dim]) == extent(shape(b)[dim]))


_ZEROS = aten("zeros", "zeros_like", "new_zeros")
_FILLS = aten("full", "full_like", "new_full")
_CONSTANTS = _ZEROS | _FILLS | aten("ones", "ones_like", "new_ones", "scalar_tensor")
_EXPANSIONS = aten("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave.self_int")
_POINTWISE = aten("__and__.Tensor", "__or__.Tensor", "__xor__.Tensor", "__and__.Scalar", "__or__.Scalar", "detach")
"""Elementwise ops that torch does not tag as such."""

DEPTH = 24
"""Ops between a coefficient and the broadcast that makes it constant: beyond it the answer is no."""


class Constants:
    """Proofs that a value is the same for all features: it was made or broadcast so, and every op since computes each
    entry from entries of the same feature, by the same formula for all features.

    barred: values that are written in place somewhere; nothing is assumed of them
    """

    def __init__(self, barred: frozenset[Node]) -> None:
        self.barred = barred
        self._known: dict[tuple[Node, Axis], bool] = {}
        self._depth = 0

    def broadcast(self, operand: Any, ndim: int, axis: Axis) -> bool:
        """Whether an operand, broadcast to `ndim` dimensions, is a number, has one entry on the axis, or is proved."""
        if value(operand) is None:
            return not isinstance(operand, (list, tuple))
        inside = expand_axis(operand, ndim, axis)
        return inside is None or self.along(operand, inside)

    def along(self, node: Node, axis: Axis) -> bool:
        """Whether a value is proved, along an axis of its own."""
        key = (node, axis)
        if key not in self._known:
            if self._depth == DEPTH:
                return False
            self._depth += 1
            self._known[key] = self._prove(node, axis)
            self._depth -= 1
        return self._known[key]

    def alike(self, node: Node, axis: Axis) -> bool:
        """Constant along the axis and not known to be zeros, which are centred as they are."""
        return self.along(node, axis) and not self.zero(node, axis)

    def zero(self, node: Node, axis: Axis) -> bool:
        """Whether a value is made of zeros alone; the axis is any of its own."""
        name = op_name(node)
        if node in self.barred:
            return False
        if name in _ZEROS:
            return True
        if name in _FILLS:
            return bool(arguments(node)["fill_value"] == 0)
        if name in _EXPANSIONS or name in _MOVES:
            source = arguments(node)["self"]
            step = self.step(node, axis)
            return step is not None and step.carried[0][0] is source and self.zero(source, step.carried[0][1])
        return False

    def step(self, node: Node, axis: Axis) -> Flow | None:
        """What the table says of a call, whatever its dtype; nothing where an operand's or the result's features are
        spread over processes."""
        step = None if APART in node.meta else self._step(node, axis)
        if step is None or not has_whole_rows(node.meta.get("val"), axis.dim):
            return None
        return step if all(has_whole_rows(value(operand), a.dim) for operand, a in step.carried) else None

    def _step(self, node: Node, axis: Axis) -> Flow | None:
        if is_getitem(node):
            producer = node.args[0]
            assert isinstance(producer, Node)
            known = op_name(producer) in PARTS and self.step(producer, axis) is not None
            return Flow(((producer, axis),)) if known else None
        if kind := crossing(node):
            summed = kind == "to_local" and is_summed(value(node.args[0]))
            return None if summed else one(node.args[0], axis)
        handler = TABLE.get(op_name(node))
        return None if handler is None else handler(Call(node, arguments(node), axis, self))

    def _prove(self, node: Node, axis: Axis) -> bool:
        name = op_name(node)
        if node in self.barred:
            return False
        if name in _CONSTANTS:
            return True
        if name in _EXPANSIONS and self._expanded(node, axis):
            return True
        if _is_pointwise(node):
            ndim = len(shape(node))
            return all(self.broadcast(operand, ndim, axis) for operand in node.all_input_nodes)
        step = self.step(node, axis)
        return step is not None and all(self.along(operand, inside) for operand, inside in step.carried)

    def _expanded(self, node: Node, axis: Axis) -> bool:
        """Whether the op repeats one entry along the axis."""
        args = arguments(node)
        if op_name(node) == "aten::repeat_interleave.self_int":
            return args["dim"] is not None and is_one(shape(args["self"])[axis.dim])
        return expand_axis(args["self"], len(shape(node)), axis) is None


_MOVES = aten("view", "reshape", "unsqueeze", "squeeze.dim", "to.dtype", "type_as", "clone", "permute", "transpose.int")


def _is_pointwise(node: Node) -> bool:
    """Elementwise and deterministic, its operands broadcast from the right (a PReLU's weight is not)."""
    target = node.target
    if not isinstance(target, OpOverload) or value(node) is None:
        return False
    drawn = RANDOM in target.tags or schema(target).is_mutable
    return (
        not drawn
        and "prelu" not in op_name(node)
        and (torch.Tag.pointwise in target.tags or op_name(node) in _POINTWISE)
    )
