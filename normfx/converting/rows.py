"""Centred rows of a parameter are rows of the centred parameter: P (rows of W) = rows of (P W)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from normfx.capture.trace import Captured
from normfx.graph.calls import add_call
from normfx.graph.nodes import arguments, entry_readers, op_name, tensor
from normfx.graph.views import settle
from normfx.ir import ops

_WHOLE_ROWS = frozenset({"aten::expand", "aten::view", "aten::reshape", "aten::flatten", "aten::unflatten"})
"""They keep rows whole if the last dimension has the same size before and after."""

_ALONG = frozenset({"aten::slice", "aten::select", "aten::index_select", "aten::unsqueeze", "aten::squeeze"})
"""They keep rows whole if they act along another dimension than the last."""


_MASKS = frozenset({torch.bool, torch.uint8})
"""A mask of n dimensions indexes as many."""


def centre_parameters(captured: Captured, shared: bool = True) -> None:
    """Centre the parameter, not the rows that were looked up or cut out of it, where nothing else reads these rows.

    shared: also a parameter that something else reads, so that there are two of them afterwards

    The rules choose by cost, and a table may be larger than the rows of a call. A copy of a model has its parameters
    only to write to.
    """
    graph = captured.graph_module.graph
    work = [node for node in graph.nodes if node.target is ops.CENTER]
    for node in work:
        while (operand := _rows_of(node)) is not None and (shared or len(operand.users) == 1):
            old: tuple[Any, ...] = node.args
            source, _, size, inner, dtype = old
            with graph.inserting_before(source):
                args = (operand, tensor(operand).ndim - 1, size, inner, dtype)
                centred = add_call(graph, ops.CENTER, args, source)
            source.replace_input_with(operand, centred)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            node = centred
    settle(captured.graph_module)


def _rows_of(node: Node) -> Node | None:
    """The value of whose rows alone the operand of a centring consists; None where that is not plain to see."""
    args: tuple[Any, ...] = node.args
    source, dim, size, inner, dtype = args
    if source.op != "call_function" or entry_readers(source) != [node]:
        return None
    rows, name = tensor(source), op_name(source).partition(".")[0]
    if dim % rows.ndim != rows.ndim - 1 or inner != 1 or rows.shape[-1] != size or size == 1 or rows.dtype != dtype:
        return None
    if name == "aten::embedding":
        operand = arguments(source)["weight"]
    elif name in _WHOLE_ROWS or _looks_rows_up(source) or (name in _ALONG and not _acts_on_rows(source)):
        operand = source.args[0]
    else:
        return None
    plain = isinstance(operand, Node) and tensor(operand).shape[-1] == size and tensor(operand).dtype == dtype
    return operand if plain else None


def _looks_rows_up(source: Node) -> bool:
    """Whether an op is an indexing without an index, of numbers or a mask, for the last dimension."""
    if not op_name(source).startswith("aten::index."):
        return False
    given = arguments(source)
    indices = [None if index is None else tensor(index) for index in given["indices"]]
    dims = sum(index.ndim if index is not None and index.dtype in _MASKS else 1 for index in indices)
    return dims < tensor(given["self"]).ndim


def _acts_on_rows(source: Node) -> bool:
    """Whether an op along one dimension acts along the last one."""
    given = arguments(source)
    wide = tensor(source) if op_name(source) == "aten::unsqueeze" else tensor(source.args[0])
    return not isinstance(given.get("dim"), int) or given["dim"] % wide.ndim == wide.ndim - 1
