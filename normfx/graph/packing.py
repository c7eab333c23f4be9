"""Weights that are stored in fewer bits than they are computed in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from normfx.compat.operators import OpOverload
from normfx.compat.tensors import parts
from normfx.graph.aliasing import operands_by_name
from normfx.graph.nodes import entries, op_name, shape, size_hint, value

INDICES = frozenset({"index", "indices"})
"""Names of schema arguments that say where entries lie."""

_ARITHMETIC = frozenset(
    {"aten::add.Tensor", "aten::sub.Tensor", "aten::rsub.Tensor", "aten::mul.Tensor", "aten::div.Tensor"}
)
"""Ops in which a broadcast operand gives many entries one number. Bit operations broadcast what they unpack."""


def packed_sources(weight: Node) -> tuple[Node, ...]:
    """Inputs of a graph that store the entries of a floating weight as integers or floats of 8 bits.

    They hold at least one bit for each entry of the weight. Not among them: an index or a mask, which says where
    entries lie, unless the index is stored in 8 bits, as codes that are looked up in a table are; one number for many
    entries (a zero point); integers that are computed from floats (signs).
    """
    found: dict[Node, None] = {}
    seen: set[tuple[Node, bool]] = set()
    work = [(weight, False)]
    while work:
        node, as_index = item = work.pop()
        if item in seen:
            continue
        seen.add(item)
        if node.op not in ("call_function", "call_method"):
            if any(_holds_codes(part, as_index) and _is_large(part, node, weight) for part in parts(value(node))):
                found[node] = None
            continue
        work += [(operand, as_index or index) for operand, index in _contents(node)]
    return tuple(found)


def _contents(node: Node) -> Iterator[tuple[Node, bool]]:
    """Operands that an op makes entries of; with each, whether it only says where they lie."""
    if not isinstance(node.target, OpOverload):
        yield from ((operand, False) for operand in node.all_input_nodes)
        return
    for name, operand in operands_by_name(node):
        spread = op_name(node) in _ARITHMETIC and _entries(operand) != _entries(node)
        if not spread:
            yield operand, name in INDICES


def _entries(node: Node) -> object:
    return entries(shape(node)) if value(node) is not None else None


def _holds_codes(fake: torch.Tensor, as_index: bool) -> bool:
    if fake.ndim == 0 or fake.dtype == torch.bool or fake.is_complex():
        return False
    narrow = fake.element_size() == 1
    return narrow if as_index or fake.is_floating_point() else True


def _is_large(part: torch.Tensor, source: Node, weight: Node) -> bool:
    bits = 8 * part.element_size() * entries(part.shape)
    return size_hint(bits, (source,)) >= size_hint(entries(shape(weight)), (weight,))
