"""Products with weights that are stored packed, whatever op computes them: a linear whose weight is made of codes, a
product of integers, an op of a library that is given the codes, a function of a tensor that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch.fx import Node

from normfx.compat.operators import OpOverload
from normfx.graph.aliasing import operands_by_name
from normfx.graph.facts import Facts
from normfx.graph.nodes import is_getitem, is_one, op_name, shape, value
from normfx.graph.packing import INDICES, packed_sources
from normfx.recognize.moves import CASTS, RESHAPES
from normfx.recognize.table import aten

_SCALES = aten("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar")
_SUMS = aten("add.Tensor", "sub.Tensor")
_MOVES = RESHAPES | CASTS | aten("permute", "transpose.int", "t")


class Packing:
    """What is packed in one graph."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[Node, bool] = {}

    @cached_property
    def _made(self) -> frozenset[Node]:
        """Values of the weights alone, by whatever calls, opaque ones too."""
        found = set(self._facts.weights)
        for node in self._facts.graph.nodes:
            inputs = node.all_input_nodes
            if node.op in ("call_function", "call_method") and inputs and all(n in found for n in inputs):
                found.add(node)
        return frozenset(found)

    def multiplies(self, node: Node) -> bool:
        """Whether a call multiplies a value by a weight that is stored packed.

        Nothing is asked of what an opaque op computes: the codes that it is given are no indices, and have two
        dimensions or more. An elementwise op multiplies no matrices.
        """
        if node not in self._known:
            self._known[node] = self._multiplies(node)
        return self._known[node]

    def _multiplies(self, node: Node) -> bool:
        target = node.target
        if node.op not in ("call_function", "call_method") or is_getitem(node) or node in self._made:
            return False
        if isinstance(target, OpOverload):
            if torch.Tag.pointwise in target.tags or op_name(node) in _MOVES:
                return False
            operands = [operand for name, operand in operands_by_name(node) if name not in INDICES]
        else:
            operands = node.all_input_nodes
        return any(operand in self._made and self._is_matrix(operand) for operand in operands)

    def unpacks(self, node: Node, operands: Iterable[Node]) -> bool:
        """Whether a call multiplies by a weight that is stored packed and is one of these operands."""
        return self.multiplies(node) and any(operand in self._made and self._is_matrix(operand) for operand in operands)

    def _is_matrix(self, weight: Node) -> bool:
        fake = value(weight)
        return fake is not None and fake.ndim > 1 and bool(packed_sources(weight))

    def writes(self, node: Node) -> bool:
        """Whether a value is the output of such a product, scaled, shifted, cast or seen in another shape.

        So would the centred weight's be: what scales it has a factor for each row or, of the weights, for each feature.
        """
        seen: set[Node] = set()
        work = [node]
        while work:
            item = work.pop()
            if item in seen or item in self._made:
                continue
            seen.add(item)
            if self.multiplies(item):
                return True
            operands = [operand for operand in item.all_input_nodes if operand not in self._made]
            name = op_name(item)
            if name in _SCALES:
                operands = [operand for operand in operands if not _one_a_row(operand)]
                work += operands if len(operands) == 1 else []
            elif name in _SUMS | _MOVES:
                work += operands
        return False


def _one_a_row(node: Node) -> bool:
    return value(node) is not None and bool(shape(node)) and is_one(shape(node)[-1])
