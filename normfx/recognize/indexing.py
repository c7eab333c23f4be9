"""The M3 table, part three: rows picked, put and added by index. An index is the same for all features, or the op is
not of this kind."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from normfx.graph.nodes import extent, shape, tensor, value
from normfx.ir.sites import Axis
from normfx.recognize.axes import index_axis, indexed_dims
from normfx.recognize.table import Call, Flow, one, op, same_extent


@op("index.Tensor")
def _index(call: Call) -> Flow | None:
    return one(call.args["self"], index_axis(call.node, call.args["self"], call.args["indices"], call.axis))


@op("gather")
def _gather(call: Call) -> Flow | None:
    """The index has an entry for each feature: they have to be equal, and all features have to be picked."""
    source = call.args["self"]
    fits = _elsewhere(call) and same_extent(source, call.node, call.axis.dim)
    return one(source, call.axis) if fits and _same_for_all(call, call.args["index"]) else None


@op("take_along_dim")
def _take_along_dim(call: Call) -> Flow | None:
    source = call.args["self"]
    if call.args["dim"] is None or not _elsewhere(call) or not call.constant(call.args["indices"]):
        return None
    return one(source, call.inside(source))


@op("scatter.src", "scatter_add", "scatter_reduce.two")
def _scatter(call: Call) -> Flow | None:
    """Rows written or added; a mean of rows divides by how many there are. The largest is none of that."""
    if call.args.get("reduce", "sum") not in ("sum", "mean") or not _elsewhere(call):
        return None
    index = call.args["index"]
    whole = all(same_extent(call.node, operand, call.axis.dim) for operand in (index, call.args["src"]))
    if not whole or not _same_for_all(call, index):
        return None
    return call.terms(("self", call.axis), ("src", call.axis))


@op("scatter.value")
def _scatter_value(call: Call) -> Flow | None:
    index = call.args["index"]
    fits = call.args["value"] == 0 and _elsewhere(call) and same_extent(call.node, index, call.axis.dim)
    return one(call.args["self"], call.axis) if fits and _same_for_all(call, index) else None


@op("index_add", "index_copy")
def _index_add(call: Call) -> Flow | None:
    return call.terms(("self", call.axis), ("source", call.axis)) if _elsewhere(call) else None


@op("index_fill.int_Scalar")
def _index_fill(call: Call) -> Flow | None:
    return one(call.args["self"], call.axis) if call.args["value"] == 0 and _elsewhere(call) else None


@op("index_fill.int_Tensor")
def _index_fill_tensor(call: Call) -> Flow | None:
    return call.terms(("self", call.axis), ("value", None)) if _elsewhere(call) else None


@op("index_put")
def _index_put(call: Call) -> Flow | None:
    """Values are broadcast to self[indices]: there lies their feature axis."""
    source, values, axis = call.args["self"], call.args["values"], call.axis
    layout = indexed_dims(source, call.args["indices"])
    if layout is None or axis.dim not in layout or value(values) is None:
        return None
    position = layout.index(axis.dim) - (len(layout) - tensor(values).ndim)
    if position < 0 or extent(shape(values)[position]) == 1:
        return call.terms(("self", axis), ("values", None))
    return call.terms(("self", axis), ("values", axis.at(position)))


@op("masked_scatter")
def _masked_scatter(call: Call) -> Flow | None:
    """The source's entries are taken in order: whole rows, where both have their features last."""
    source, values, axis = call.args["self"], call.args["source"], call.axis
    last = Axis(tensor(values).ndim - 1, axis.size)
    if axis != Axis(call.ndim - 1, axis.size) or last.dim < 0 or not call.constant(call.args["mask"]):
        return None
    whole = all(extent(shape(operand)[-1]) == axis.size for operand in (call.node, source, values))
    return call.terms(("self", call.inside(source)), ("source", last)) if whole else None


@op("select_scatter")
def _select_scatter(call: Call) -> Flow | None:
    axis, dim = call.axis, call.args["dim"] % call.ndim
    if dim == axis.dim:
        return None
    return call.terms(("self", axis), ("src", axis.at(axis.dim - (dim < axis.dim))))


@op("slice_scatter")
def _slice_scatter(call: Call) -> Flow | None:
    return call.terms(("self", call.axis), ("src", call.axis)) if _elsewhere(call) else None


def _elsewhere(call: Call) -> bool:
    """Whether the op acts along another dimension than the features'."""
    dim: Any = call.args["dim"]
    return bool(dim % call.ndim != call.axis.dim)


def _same_for_all(call: Call, index: Node) -> bool:
    return call.constants.along(index, call.axis)
