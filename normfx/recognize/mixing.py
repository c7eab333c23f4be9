"""The M3 table, part four: ops over tokens, linear and with the same weights for every channel."""

from __future__ import annotations

from normfx.graph.nodes import extent, op_name, shape, value
from normfx.recognize.table import Call, Flow, Handler, one, op


@op("sum.dim_IntList", "mean.dim")
def _reduce(call: Call) -> Flow | None:
    source, args = call.args["self"], call.args
    ndim = len(shape(source))
    if not args["dim"]:
        return None
    dims = {d % ndim for d in args["dim"]}
    kept = list(range(ndim)) if args["keepdim"] else [d for d in range(ndim) if d not in dims]
    dim = kept[call.axis.dim]
    return None if dim in dims else one(source, call.axis.at(dim))


@op("diff")
def _diff(call: Call) -> Flow | None:
    if call.args["dim"] % call.ndim == call.axis.dim:
        return None
    rows = [call.args[name] for name in ("self", "prepend", "append") if call.args[name] is not None]
    if any(value(row) is None or len(shape(row)) != call.ndim for row in rows):
        return None
    return Flow(tuple((row, call.axis) for row in rows))


def _channels(spatial: int) -> Handler:
    """Pooling and interpolation: linear over the trailing spatial dimensions, each channel alike."""

    def handler(call: Call) -> Flow | None:
        source = call.args.get("self", call.args.get("input"))
        return one(source, call.axis) if call.axis.dim < call.ndim - spatial else None

    return handler


for _n in (1, 2, 3):
    op(f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d")(_channels(_n))
for _kind, _n in (
    ("nearest1d", 1), ("linear1d", 1), ("nearest2d", 2), ("bilinear2d", 2), ("bicubic2d", 2),
    ("_nearest_exact1d", 1), ("_nearest_exact2d", 2), ("_nearest_exact3d", 3), ("nearest3d", 3), ("trilinear3d", 3),
    ("_bilinear2d_aa", 2), ("_bicubic2d_aa", 2),
):  # fmt: skip
    _base = f"_upsample{_kind}" if _kind.startswith("_") else f"upsample_{_kind}"
    op(_base, _base + ".vec")(_channels(_n))


@op("im2col", "col2im")
def _patches(call: Call) -> Flow | None:
    """Patches of an image (N, C, H, W) as (N, C·k, L), and back: a channel's k entries lie side by side."""
    source, axis = call.args["self"], call.axis
    height, width = call.args["kernel_size"]
    k, unfolds = height * width, op_name(call.node) == "aten::im2col"
    channels = shape(source if unfolds else call.node)[-3]
    if extent(channels) != axis.size or axis.inner != (k if unfolds else 1):
        return None
    if axis.dim != call.ndim - (2 if unfolds else 3):
        return None
    dim = len(shape(source)) - (3 if unfolds else 2)
    return one(source, type(axis)(dim, axis.size, 1 if unfolds else k))
