"""The M3 table: ops f with f(Px) = P f(x) along a feature axis.

`flow(node, axis)` answers for one node and one feature axis of its output: on which operands is it linear with
coefficients that do not depend on the feature index (`carried`, with the axis inside each operand), and which additive
operands are constant along the axis, so that their centred form is 0 (`dropped`). None: the op is not of that kind.

A linear's weight and bias count as carried along its output features: W a + b is linear in (W, b), so P W, P b centre
it (M2). The same answer serves readers, which walk it forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from normfx.ir.graph import arguments, extent, is_getitem, is_one, op_name, shape, value
from normfx.ir.sites import Axis
from normfx.recognize.axes import expand_axis, index_axis, permute_axis, reshape_axis


@dataclass(frozen=True)
class Flow:
    """carried: (operand, its axis); dropped: names of schema arguments."""

    carried: tuple[tuple[Node, Axis], ...]
    dropped: tuple[str, ...] = ()


Handler = Callable[[Node, dict[str, Any], Axis], Flow | None]
_TABLE: dict[str, Handler] = {}


def flow(node: Node, axis: Axis) -> Flow | None:
    """How the feature axis of this node's output flows from its operands; None when the op is not in the table."""
    if is_getitem(node):
        producer = node.args[0]
        assert isinstance(producer, Node)
        known = op_name(producer) in PARTS and flow(producer, axis) is not None
        return Flow(((producer, axis),)) if known else None
    name = op_name(node)
    handler = _TABLE.get(name)
    if handler is None:
        return None
    fake = value(node)
    if fake is not None and not fake.is_floating_point():
        return None
    return handler(node, arguments(node), axis)


def _op(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            _TABLE["aten::" + name] = handler
        return handler

    return register


def _one(operand: Any, axis: Axis | None) -> Flow | None:
    fake = value(operand)
    if axis is None or fake is None or not fake.is_floating_point():
        return None
    return Flow(((operand, axis),))


def constant_along(operand: Any, ndim: int, axis: Axis) -> bool:
    """Whether a broadcast operand is the same for all features: a number, or one entry along the axis."""
    if value(operand) is None:
        return not isinstance(operand, (list, tuple))
    return expand_axis(operand, ndim, axis) is None


def _terms(node: Node, args: dict[str, Any], names: Sequence[str], axis: Axis) -> Flow | None:
    """A sum of broadcast operands: each is carried, or constant along the axis and dropped."""
    ndim = len(shape(node))
    carried: list[tuple[Node, Axis]] = []
    dropped: list[str] = []
    for name in names:
        operand = args[name]
        if constant_along(operand, ndim, axis):
            dropped.append(name)
            continue
        inside = expand_axis(operand, ndim, axis)
        fake = value(operand)
        if inside is None or fake is None or not fake.is_floating_point():
            return None
        carried.append((operand, inside))
    return Flow(tuple(carried), tuple(dropped)) if carried else None


@_op("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar")
def _add(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    return _terms(node, args, ("self", "other"), axis)


@_op("neg")
def _neg(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    return _one(args["self"], axis)


@_op("mul.Tensor", "mul.Scalar")
def _mul(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    a, b = args["self"], args["other"]
    if constant_along(b, ndim, axis):
        a, b = b, a
    if not constant_along(a, ndim, axis) or value(b) is None:
        return None
    return _one(b, expand_axis(b, ndim, axis))


@_op("div.Tensor", "div.Scalar")
def _div(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    if not constant_along(args["other"], ndim, axis) or value(args["self"]) is None:
        return None
    return _one(args["self"], expand_axis(args["self"], ndim, axis))


RESHAPES = frozenset(
    "aten::" + n
    for n in (
        "view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "squeeze", "squeeze.dim",
        "squeeze.dims", "unsqueeze", "view_as", "reshape_as",
    )
)  # fmt: skip


@_op(*(n.removeprefix("aten::") for n in RESHAPES))
def _reshape(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    source = args["self"]
    return _one(source, reshape_axis(shape(node), shape(source), axis))


@_op("permute", "transpose.int", "t", "mT", "numpy_T", "swapaxes", "swapdims", "movedim.int", "movedim.intlist")
def _permute(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    order = list(range(ndim))
    base = op_name(node).removeprefix("aten::").split(".")[0]
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
    return _one(args["self"], permute_axis(order, axis))


@_op("expand", "expand_as", "broadcast_to")
def _expand(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    return _one(args["self"], expand_axis(args["self"], len(shape(node)), axis))


CASTS = frozenset(
    "aten::" + n
    for n in (
        "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as", "clone", "contiguous", "alias",
        "detach",
    )
)  # fmt: skip


@_op(*(n.removeprefix("aten::") for n in CASTS))
def _cast(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    return _one(args["self"], axis)


@_op("dropout")
def _dropout(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    """Identity in eval and for p = 0; otherwise elementwise, which does not commute with P (M12)."""
    return _one(args["input"], axis) if args["p"] == 0 or not args["train"] else None


@_op("select.int")
def _select(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    dim = args["dim"] % len(shape(args["self"]))
    return _one(args["self"], axis.at(axis.dim + (dim <= axis.dim)))


def _other_dim(*dims: str) -> Handler:
    """Ops on other dimensions that keep the number of dimensions."""

    def handler(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
        ndim = len(shape(args["self"]))
        for name in dims:
            given = args[name]
            given = [given] if isinstance(given, int) else given
            if not given or any(d % ndim == axis.dim for d in given):
                return None
        return _one(args["self"], axis)

    return handler


_op("slice.Tensor", "narrow", "cumsum", "index_select", "repeat_interleave.self_int", "repeat_interleave.self_Tensor")(
    _other_dim("dim")
)
_op("roll", "flip")(_other_dim("dims"))

PARTS = frozenset(
    "aten::" + n
    for n in ("split.Tensor", "split.sizes", "split_with_sizes", "chunk", "unbind.int", "tensor_split.sections")
)


@_op(*(n.removeprefix("aten::") for n in PARTS))
def _split(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    """A list of pieces; `axis` is the axis of each piece."""
    ndim = len(shape(args["self"]))
    dim = args["dim"] % ndim
    if op_name(node) == "aten::unbind.int":
        return _one(args["self"], axis.at(axis.dim + (dim <= axis.dim)))
    return _one(args["self"], axis) if dim != axis.dim else None


@_op("cat", "concat", "concatenate", "stack")
def _cat(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    dim = args["dim"] % ndim
    if dim == axis.dim:
        return None
    inside = axis.at(axis.dim - (dim < axis.dim)) if op_name(node) == "aten::stack" else axis
    whole = shape(node)[axis.dim]
    carried = []
    for part in args["tensors"]:
        fake = value(part)
        if fake is None or not fake.is_floating_point() or fake.ndim <= inside.dim:
            return None
        if extent(fake.shape[inside.dim]) != extent(whole):
            return None  # torch.cat lets an empty one-dimensional tensor pass
        carried.append((part, inside))
    return Flow(tuple(carried))


@_op("sum.dim_IntList", "mean.dim")
def _reduce(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(args["self"]))
    if not args["dim"]:
        return None
    dims = {d % ndim for d in args["dim"]}
    kept = list(range(ndim)) if args["keepdim"] else [d for d in range(ndim) if d not in dims]
    source = kept[axis.dim]
    return None if source in dims else _one(args["self"], axis.at(source))


@_op("constant_pad_nd", "pad")
def _pad(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    """Padding of other dimensions with zeros, or with copies of rows."""
    ndim = len(shape(node))
    zero = args["value"] in (None, 0)
    if args.get("mode", "constant") == "constant" and not zero:
        return None
    pad = args["pad"]
    first = ndim - len(pad) // 2
    touched = [ndim - 1 - i // 2 for i, n in enumerate(pad) if n != 0]
    return None if axis.dim >= first and axis.dim in touched else _one(args["self"], axis)


@_op("repeat", "tile")
def _repeat(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    repeats = args["repeats" if "repeats" in args else "dims"]
    repeats = [1] * (ndim - len(repeats)) + list(repeats)
    if not is_one(repeats[axis.dim]):
        return None
    return _one(args["self"], expand_axis(args["self"], ndim, axis))


@_op("index.Tensor")
def _index(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    return _one(args["self"], index_axis(node, args["self"], args["indices"], axis))


@_op("masked_fill.Scalar")
def _masked_fill(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    ndim = len(shape(node))
    if args["value"] != 0 or not constant_along(args["mask"], ndim, axis):
        return None
    return _one(args["self"], expand_axis(args["self"], ndim, axis))


@_op("where.self")
def _where(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    if not constant_along(args["condition"], len(shape(node)), axis):
        return None
    return _terms(node, args, ("self", "other"), axis)


def _channels(spatial: int) -> Handler:
    """Pooling and interpolation: linear over the trailing spatial dimensions, each channel alike."""

    def handler(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
        source = args.get("self", args.get("input"))
        return _one(source, axis) if axis.dim < len(shape(node)) - spatial else None

    return handler


for _n in (1, 2, 3):
    _op(f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d")(_channels(_n))
for _kind, _n in (
    ("nearest1d", 1), ("linear1d", 1), ("nearest2d", 2), ("bilinear2d", 2), ("bicubic2d", 2),
    ("_nearest_exact1d", 1), ("_nearest_exact2d", 2), ("nearest3d", 3), ("trilinear3d", 3),
):  # fmt: skip
    _base = f"_upsample{_kind}" if _kind.startswith("_") else f"upsample_{_kind}"
    _op(_base, _base + ".vec")(_channels(_n))


@_op("linear")
def _linear(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    """Along the output features: carried by weight rows and bias. Along another dimension: a token mixer."""
    ndim = len(shape(node))
    if axis.dim == ndim - 1:
        return _weight_flow(args["weight"], 0, args["bias"], 0, axis)
    source = _one(args["input"], axis)
    if source is None or args["bias"] is None:
        return source
    return Flow(source.carried, ("bias",))


@_op("addmm")
def _addmm(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    product = (args["mat1"], axis) if axis.dim == 0 else (args["mat2"], axis)
    if value(product[0]) is None:
        return None
    if constant_along(args["self"], 2, axis):
        return Flow((product,), ("self",))
    inside = expand_axis(args["self"], 2, axis)
    assert inside is not None
    return Flow(((args["self"], inside), product))


@_op("mm", "bmm", "matmul")
def _matmul(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    a = args["self"]
    b = args["mat2" if "mat2" in args else "other"]
    ndim = len(shape(node))
    if len(shape(a)) < 2 or len(shape(b)) < 2:
        return None
    if axis.dim == ndim - 1:
        return _one(b, axis.at(len(shape(b)) - 1))
    if axis.dim == ndim - 2:
        return _one(a, axis.at(len(shape(a)) - 2))
    return None


@_op(
    "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "convolution",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
)  # fmt: skip
def _convolution(node: Node, args: dict[str, Any], axis: Axis) -> Flow | None:
    """Along the channels, dense convolutions only: P would mix the groups of a grouped one (T1)."""
    spatial = len(shape(args["weight"])) - 2
    if args["groups"] != 1 or axis.dim != len(shape(node)) - spatial - 1:
        return None
    transposed = args.get("transposed", "transpose" in op_name(node))
    return _weight_flow(args["weight"], 1 if transposed else 0, args["bias"], 0, axis)


def _weight_flow(weight: Node, dim: int, bias: Node | None, bias_dim: int, axis: Axis) -> Flow | None:
    carried = _one(weight, axis.at(dim))
    if carried is None or bias is None:
        return carried
    return Flow((*carried.carried, (bias, axis.at(bias_dim))))


LINEARS = frozenset(n for n, h in _TABLE.items() if h in (_linear, _addmm, _matmul, _convolution))
