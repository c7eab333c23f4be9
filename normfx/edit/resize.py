"""Another size of one dimension of a value: which ops follow, and with what arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from normfx.compat import pytree
from normfx.errors import NormfxError
from normfx.graph.calls import fake_result
from normfx.graph.nodes import LIKE, SHAPE_READS, SHAPED_AS, arguments, extent, is_getitem, op_name
from normfx.ir.sites import Axis

_SIZES = {
    "aten::view": "size",
    "aten::reshape": "shape",
    "aten::_unsafe_view": "size",
    "aten::expand": "size",
    "aten::broadcast_to": "size",
}
"""Ops that name the sizes of their result."""

_RIGID = SHAPED_AS | {"aten::unflatten.int"}
"""Ops that take the size from somewhere else."""


def resizable(node: Node, axis: Axis, size: int) -> bool:
    """Whether an op of the M3 table, along this whole dimension of `size` entries, can have another number of them."""
    name = op_name(node)
    if name in _RIGID:
        return False
    if name not in _SIZES:
        return bool(name) or is_getitem(node)
    sizes = arguments(node)[_SIZES[name]]
    return sizes[axis.dim] in (size, -1)


def resized(node: Node, axis: Axis, size: int) -> tuple[Any, ...]:
    """The arguments with which a resizable node has `size` entries along the axis."""
    name = op_name(node)
    if name not in _SIZES:
        return node.args
    sizes = list(arguments(node)[_SIZES[name]])
    if sizes[axis.dim] != -1:
        sizes[axis.dim] = size
    return (node.args[0], sizes, *node.args[2:])


def reads_size(user: Node, axis: Axis) -> bool:
    """Whether a node reads the size of this dimension, or something that depends on it."""
    name = op_name(user)
    if name in LIKE or name in SHAPED_AS:
        return True
    return name in SHAPE_READS and not (name == "aten::sym_size.int" and user.args[1] != axis.dim)


def resize(graph: Graph, widths: Mapping[Node, tuple[Axis, int]], sources: Iterable[Node]) -> None:
    """Give values another number of entries along an axis, in place; `sources` have it already. Fakes are computed
    again of everything that follows.

    Raises NormfxError where the new width would leave the graph.
    """
    ready = set(sources)
    changed = ready | {node for node in widths if node.op == "call_function"}
    for node in graph.nodes:
        if node in ready or (node not in changed and changed.isdisjoint(node.all_input_nodes)):
            continue
        if node.op == "output":
            found = ", ".join(source.name for source in node.all_input_nodes if source in changed)
            raise NormfxError(f"normfx: values of another width leave the graph: {found}; please report this")
        if node in widths:
            axis, size = widths[node]
            node.args = resized(node, axis, size)
        before, node.meta["val"] = node.meta["val"], fake_result(node.target, node.args, node.kwargs)
        if _shapes(before) != _shapes(node.meta["val"]):
            changed.add(node)


def _shapes(val: Any) -> list[tuple[Any, ...]]:
    return [tuple(map(extent, leaf.shape)) for leaf in pytree.tree_leaves(val) if isinstance(leaf, torch.Tensor)]
