"""The M3 table, part five: linears. Along its output features a linear W a + b is linear in (W, b), so P W, P b centre
it (M2); along another dimension it mixes tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from normfx.graph.nodes import arguments, op_name, shape, value
from normfx.ir.sites import Axis
from normfx.recognize.table import TABLE, Call, Flow, one, op


@op("linear")
def _linear(call: Call) -> Flow | None:
    args, axis = call.args, call.axis
    if axis.dim == call.ndim - 1:
        return _weight_flow(args["weight"], 0, args["bias"], 0, axis)
    source = one(args["input"], axis)
    if source is None or args["bias"] is None:
        return source
    return Flow(source.carried, ("bias",))


@op("addmm", "baddbmm", "addbmm")
def _addmm(call: Call) -> Flow | None:
    """self + Σ a b, over the batch too in addbmm; not along the batch."""
    first, second = (name for name in call.args if name not in ("self", "beta", "alpha"))
    name, back = (second, 1) if call.axis.dim == call.ndim - 1 else (first, 2)
    operand = call.args[name]
    if call.axis.dim < call.ndim - 2 or value(operand) is None:
        return None
    product = (operand, call.axis.at(len(shape(operand)) - back))
    bias = call.args["self"]
    inside = call.inside(bias)
    if inside is None or call.constants.alike(bias, inside):
        return Flow((product,), ("self",))
    return Flow(((bias, inside), product))


@op("mm", "bmm", "matmul", "mv")
def _matmul(call: Call) -> Flow | None:
    a = call.args["self"]
    b = next(call.args[name] for name in ("mat2", "other", "vec") if name in call.args)
    first, second, back = len(shape(a)), len(shape(b)), call.ndim - call.axis.dim
    if min(first, second) == 1:  # a vector: its dimension is summed
        matrix, dims = (a, first) if second == 1 else (b, second)
        summed = dims - 1 if second == 1 else dims - 2
        if dims < 2:
            return None
        kept = [dim for dim in range(dims) if dim != summed]
        return one(matrix, call.axis.at(kept[call.axis.dim]))
    if back == 1:
        return one(b, call.axis.at(second - 1))
    return one(a, call.axis.at(first - 2)) if back == 2 else None


@op("_grouped_mm")
def _grouped_mm(call: Call) -> Flow | None:
    """Rows times the matrix of their group: along its columns linear in all the matrices. Not so where the columns are
    grouped (a matrix for each group times one matrix): each is read by its group's rows alone."""
    a, b = call.args["self"], call.args["mat2"]
    columns = len(shape(a)) == 3 and len(shape(b)) == 2
    if call.args["bias"] is not None or call.axis.dim != call.ndim - 1 or columns:
        return None
    return one(b, call.axis.at(len(shape(b)) - 1))


@op(
    "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "convolution",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input",
)  # fmt: skip
def _convolution(call: Call) -> Flow | None:
    """Along the channels, dense convolutions only: P would mix the groups of a grouped one."""
    args, axis = call.args, call.axis
    spatial = len(shape(args["weight"])) - 2
    if args["groups"] != 1 or axis.dim != call.ndim - spatial - 1:
        return None
    transposed = args.get("transposed", "transpose" in op_name(call.node))
    return _weight_flow(args["weight"], 1 if transposed else 0, args["bias"], 0, axis)


def _weight_flow(weight: Node, dim: int, bias: Node | None, bias_dim: int, axis: Axis) -> Flow | None:
    carried = one(weight, axis.at(dim))
    if carried is None or bias is None:
        return carried
    return Flow((*carried.carried, (bias, axis.at(bias_dim))))


CONVOLUTIONS = frozenset(name for name, handler in TABLE.items() if handler is _convolution)

LINEARS = frozenset(n for n, h in TABLE.items() if h in (_linear, _addmm, _matmul, _grouped_mm, _convolution))
"""Linears whose weight and bias are arguments of their own."""


@op("einsum")
def _einsum(call: Call) -> Flow | None:
    """The feature letter stands once in one operand; in others only where they are the same for all features."""
    operands = call.args["tensors"]
    spelled = einsum_letters(call.args["equation"], [len(shape(o)) for o in operands], call.ndim)
    if spelled is None:
        return None
    inputs, output = spelled
    letter = output[call.axis.dim]
    carried: list[tuple[Node, Axis]] = []
    for operand, letters in zip(operands, inputs, strict=True):
        if letter not in letters:
            continue
        inside = call.axis.at(letters.index(letter))
        if letters.count(letter) > 1:
            return None
        if shape(operand)[inside.dim] != 1 and not call.constants.along(operand, inside):
            carried.append((operand, inside))
    return Flow(tuple(carried)) if len(carried) == 1 and output.count(letter) == 1 else None


def einsum_letters(equation: str, ndims: Sequence[int], ndim: int) -> tuple[list[list[str]], list[str]] | None:
    """The letter of each dimension of each operand and of the output; dimensions after "..." are named by number."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow or ("..." in right and "..." not in left):
        return None
    parts = left.split(",")
    spelled = [_letters(part, n) for part, n in zip(parts, ndims, strict=True)]
    output = _letters(right, ndim)
    if output is None or any(letters is None for letters in spelled):
        return None
    return [letters for letters in spelled if letters is not None], output


def _letters(part: str, ndim: int) -> list[str] | None:
    before, dots, after = part.partition("...")
    hidden = ndim - len(before) - len(after)
    if hidden < 0 or (hidden and not dots):
        return None
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]


@op("tensordot")
def _tensordot(call: Call) -> Flow | None:
    """Free dimensions of the first, then those of the second; the others are summed over."""
    first, second = call.args["self"], call.args["other"]
    free = []
    for operand, summed in ((first, call.args["dims_self"]), (second, call.args["dims_other"])):
        ndim = len(shape(operand))
        taken = {d % ndim for d in summed}
        free += [(operand, dim) for dim in range(ndim) if dim not in taken]
    operand, dim = free[call.axis.dim]
    return one(operand, call.axis.at(dim))


def scales_rows(linear: Node, axis: Axis, step: Flow) -> bool:
    """Whether a factor for each output feature may be folded into a linear (M11): all that runs over the features is a
    weight and bias, or a matrix on the right of a product and what is added to it."""
    args, name = arguments(linear), op_name(linear)
    if "weight" in args:
        return all(operand in (args["weight"], args["bias"]) for operand, _ in step.carried)
    if name not in ("aten::addmm", "aten::mm", "aten::matmul") or axis.dim != len(shape(linear)) - 1:
        return False
    return len(shape(args["other" if name == "aten::matmul" else "mat2"])) == 2
