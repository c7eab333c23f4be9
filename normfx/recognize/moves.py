"""The M3 table, part one: ops that move whole rows, and casts."""

from __future__ import annotations

from typing import Any

from normfx.graph.nodes import extent, is_one, op_name, shape, value
from normfx.ir.sites import Axis
from normfx.recognize.axes import permute_axis, reshape_axis
from normfx.recognize.table import PARTS, Call, Flow, Handler, aten, one, op

RESHAPES = aten(
    "view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "squeeze", "squeeze.dim", "squeeze.dims",
    "unsqueeze", "view_as", "reshape_as",
)  # fmt: skip


@op(*(n.removeprefix("aten::") for n in RESHAPES))
def _reshape(call: Call) -> Flow | None:
    source = call.args["self"]
    return one(source, reshape_axis(shape(call.node), shape(source), call.axis))


@op("permute", "transpose.int", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim.int", "movedim.intlist")
def _permute(call: Call) -> Flow | None:
    ndim, args = call.ndim, call.args
    order = list(range(ndim))
    base = op_name(call.node).removeprefix("aten::").split(".")[0]
    if base == "permute":
        order = [d % ndim for d in args["dims"]]
    elif base in ("transpose", "swapaxes", "swapdims"):
        a, b = (args[k] % ndim for k in args if k != "self")
        order[a], order[b] = b, a
    elif base in ("t", "numpy_T"):
        order.reverse()
    elif base == "mT":
        order[-2:] = [ndim - 1, ndim - 2]
    else:
        sources, targets = args["source"], args["destination"]
        sources = [s % ndim for s in ([sources] if isinstance(sources, int) else sources)]
        targets = [t % ndim for t in ([targets] if isinstance(targets, int) else targets)]
        rest = [d for d in range(ndim) if d not in sources]
        order = [sources[targets.index(i)] if i in targets else rest.pop(0) for i in range(ndim)]
    return one(args["self"], permute_axis(order, call.axis))


@op("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Flow | None:
    return one(call.args["self"], call.inside(call.args["self"]))


CASTS = aten(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as", "clone", "contiguous", "alias",
    "detach",
)  # fmt: skip


@op(*(n.removeprefix("aten::") for n in CASTS))
def _cast(call: Call) -> Flow | None:
    return one(call.args["self"], call.axis)


@op("dropout")
def _dropout(call: Call) -> Flow | None:
    """Identity in eval and for p = 0; otherwise elementwise, which does not commute with P (M12)."""
    return one(call.args["input"], call.axis) if call.args["p"] == 0 or not call.args["train"] else None


@op("select.int")
def _select(call: Call) -> Flow | None:
    source, axis = call.args["self"], call.axis
    dim = call.args["dim"] % len(shape(source))
    return one(source, axis.at(axis.dim + (dim <= axis.dim)))


def _other_dim(*dims: str) -> Handler:
    """Ops on other dimensions that keep the number of dimensions."""

    def handler(call: Call) -> Flow | None:
        ndim = len(shape(call.args["self"]))
        for name in dims:
            given = call.args[name]
            given = [given] if isinstance(given, int) else given
            if not given or any(d % ndim == call.axis.dim for d in given):
                return None
        return one(call.args["self"], call.axis)

    return handler


op("cumsum", "index_select", "repeat_interleave.self_int", "repeat_interleave.self_Tensor")(_other_dim("dim"))
op("roll", "flip", "rot90")(_other_dim("dims"))


@op("unfold")
def _unfold(call: Call) -> Flow | None:
    """Windows of another dimension, their entries in a new last one."""
    ndim = len(shape(call.args["self"]))
    dim = call.args["dimension"] % ndim
    return None if call.axis.dim in (dim, ndim) else one(call.args["self"], call.axis)


@op(*(n.removeprefix("aten::") for n in PARTS))
def _split(call: Call) -> Flow | None:
    """A list of pieces; `axis` is the axis of each piece."""
    source, axis = call.args["self"], call.axis
    dim = call.args["dim"] % len(shape(source))
    if op_name(call.node) == "aten::unbind.int":
        return one(source, axis.at(axis.dim + (dim <= axis.dim)))
    sizes = [piece.shape[dim] for piece in call.node.meta["val"]]
    return one(source, axis) if dim != axis.dim or _whole_rows(axis, *sizes) else None


def _whole_rows(axis: Axis, *entries: Any) -> bool:
    """Whether so many entries of the axis' dimension are whole rows: cut there, P acts on each piece by itself."""
    return all(isinstance(n, int) and n % (axis.size * axis.inner) == 0 for n in entries)


@op("slice.Tensor", "narrow")
def _slice(call: Call) -> Flow | None:
    """Along the features, whole rows of them."""
    source, axis = call.args["self"], call.axis
    if call.args["dim"] % call.ndim == axis.dim:
        length = shape(source)[axis.dim]
        start = call.args["start"] or 0
        start = start + length if isinstance(start, int) and start < 0 else start
        if call.args.get("step", 1) != 1 or not _whole_rows(axis, length, start, shape(call.node)[axis.dim]):
            return None
    return one(source, axis)


@op("cat", "concat", "concatenate", "stack")
def _cat(call: Call) -> Flow | None:
    axis, dim = call.axis, call.args["dim"] % call.ndim
    if dim == axis.dim:
        return None
    inside = axis.at(axis.dim - (dim < axis.dim)) if op_name(call.node) == "aten::stack" else axis
    whole = shape(call.node)[axis.dim]
    carried = []
    for part in call.args["tensors"]:
        fake = value(part)
        if fake is None or fake.ndim <= inside.dim or extent(fake.shape[inside.dim]) != extent(whole):
            return None  # torch.cat lets an empty one-dimensional tensor pass
        carried.append((part, inside))
    return Flow(tuple(carried))


@op("constant_pad_nd", "pad")
def _pad(call: Call) -> Flow | None:
    """Padding of other dimensions with zeros, or with copies of rows."""
    args, ndim, axis = call.args, call.ndim, call.axis
    zero = args["value"] in (None, 0)
    if args.get("mode", "constant") == "constant" and not zero:
        return None
    pad = args["pad"]
    first = ndim - len(pad) // 2
    touched = [ndim - 1 - i // 2 for i, n in enumerate(pad) if n != 0]
    return None if axis.dim >= first and axis.dim in touched else one(args["self"], axis)


@op("repeat", "tile")
def _repeat(call: Call) -> Flow | None:
    repeats = call.args["repeats" if "repeats" in call.args else "dims"]
    repeats = [1] * (call.ndim - len(repeats)) + list(repeats)
    return one(call.args["self"], call.inside(call.args["self"])) if is_one(repeats[call.axis.dim]) else None
