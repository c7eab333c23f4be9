"""The M3 table, part two: sums, and products with what is the same for all features."""

from __future__ import annotations

from normfx.graph.nodes import op_name, value
from normfx.recognize.table import Call, Flow, one, op


@op(
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar", "subtract.Tensor",
    "subtract.Scalar",
)  # fmt: skip
def _add(call: Call) -> Flow | None:
    return call.broadcast_terms("self", "other")


@op("neg", "negative", "positive")
def _neg(call: Call) -> Flow | None:
    return one(call.args["self"], call.axis)


@op("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")
def _mul(call: Call) -> Flow | None:
    a, b = call.args["self"], call.args["other"]
    if call.constant(b):
        a, b = b, a
    if not call.constant(a) or value(b) is None:
        return None
    return one(b, call.inside(b))


@op(
    "div.Tensor", "div.Scalar", "divide.Tensor", "divide.Scalar", "true_divide.Tensor", "true_divide.Scalar",
)  # fmt: skip
def _div(call: Call) -> Flow | None:
    source = call.args["self"]
    if not call.constant(call.args["other"]) or value(source) is None:
        return None
    return one(source, call.inside(source))


@op("lerp.Scalar", "lerp.Tensor")
def _lerp(call: Call) -> Flow | None:
    """self + w (end − self)"""
    return call.broadcast_terms("self", "end") if call.constant(call.args["weight"]) else None


@op("addcmul", "addcdiv")
def _addcmul(call: Call) -> Flow | None:
    """self + v a·b, self + v a/b"""
    divides = op_name(call.node) == "aten::addcdiv"
    if call.constant(call.args["tensor2"]):
        return call.broadcast_terms("self", "tensor1")
    if divides or not call.constant(call.args["tensor1"]):
        return None
    return call.broadcast_terms("self", "tensor2")


@op("masked_fill.Scalar")
def _masked_fill(call: Call) -> Flow | None:
    """Accepts zeros alone: another number would stand where a centred row has 0."""
    if call.args["value"] != 0 or not call.constant(call.args["mask"]):
        return None
    return one(call.args["self"], call.inside(call.args["self"]))


@op("masked_fill.Tensor")
def _masked_fill_tensor(call: Call) -> Flow | None:
    return call.broadcast_terms("self", "value") if call.constant(call.args["mask"]) else None


@op("where.self", "where.ScalarOther", "where.ScalarSelf")
def _where(call: Call) -> Flow | None:
    return call.broadcast_terms("self", "other") if call.constant(call.args["condition"]) else None
