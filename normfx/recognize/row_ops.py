"""What each op makes of the expressions of its operands, per row (see rows.py and algebra.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from torch.fx import Node

from normfx.graph.nodes import op_name, value
from normfx.recognize import algebra
from normfx.recognize.algebra import Outside, Poly, X
from normfx.recognize.rows import (
    CASTS,
    COPIES,
    RESHAPES,
    Call,
    Form,
    Forms,
    Handler,
    Rows,
    reduced_dims,
    same_shape,
    widens,
)

HALF = Fraction(1, 2)
HANDLERS: dict[str, Handler] = {}
"""The handlers, by op name."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _number(arg: object) -> float:
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    raise Outside


@handles("aten::add.Tensor", "aten::add.Scalar")
def _add(rows: Rows, node: Node, call: Call) -> Form:
    a, b, dropped = rows.pair(call["self"], call["other"])
    return Form(algebra.add(a, b, _number(call.get("alpha", 1))), dropped)


@handles("aten::sub.Tensor", "aten::sub.Scalar", "aten::subtract.Tensor", "aten::subtract.Scalar")
def _sub(rows: Rows, node: Node, call: Call) -> Form:
    a, b, dropped = rows.pair(call["self"], call["other"])
    return Form(algebra.add(a, b, -_number(call.get("alpha", 1))), dropped)


@handles("aten::rsub.Tensor", "aten::rsub.Scalar")
def _rsub(rows: Rows, node: Node, call: Call) -> Form:
    b, a, dropped = rows.pair(call["self"], call["other"])
    return Form(algebra.add(a, b, -_number(call.get("alpha", 1))), dropped)


@handles("aten::mul.Tensor", "aten::mul.Scalar", "aten::multiply.Tensor", "aten::multiply.Scalar")
def _mul(rows: Rows, node: Node, call: Call) -> Form:
    a, b, dropped = rows.pair(call["self"], call["other"])
    return Form(algebra.mul(a, b), dropped)


@handles(
    "aten::div.Tensor", "aten::div.Scalar", "aten::divide.Tensor", "aten::divide.Scalar",
    "aten::true_divide.Tensor", "aten::true_divide.Scalar",
)  # fmt: skip
def _div(rows: Rows, node: Node, call: Call) -> Form:
    a, b, dropped = rows.pair(call["self"], call["other"])
    return Form(algebra.mul(a, algebra.power(b, Fraction(-1))), dropped)


def _fused(n: Fraction) -> Handler:
    """self + value·tensor1·tensor2^n"""

    def handler(rows: Rows, node: Node, call: Call) -> Form:
        a, b, dropped = rows.pair(call["tensor1"], call["tensor2"])
        c = rows.operand(call["self"])
        if dropped or c.dropped:
            raise Outside
        return Form(algebra.add(c.poly, algebra.mul(a, algebra.power(b, n)), _number(call["value"])))

    return handler


HANDLERS["aten::addcmul"] = _fused(Fraction(1))
HANDLERS["aten::addcdiv"] = _fused(Fraction(-1))


@handles("aten::pow.Tensor_Scalar")
def _pow(rows: Rows, node: Node, call: Call) -> Form:
    n = Fraction(_number(call["exponent"]))
    if n.denominator > 4:
        raise Outside
    return _powered(rows, call["self"], n)


def _powered(rows: Rows, arg: object, n: Fraction) -> Form:
    form = rows.operand(arg)
    return replace(form, poly=algebra.power(form.poly, n))


def _fixed_power(n: Fraction) -> Handler:
    return lambda rows, node, call: _powered(rows, call["self"], n)


for _name, _n in (("square", Fraction(2)), ("sqrt", HALF), ("rsqrt", -HALF), ("reciprocal", Fraction(-1))):
    HANDLERS[f"aten::{_name}"] = _fixed_power(_n)


@handles("aten::neg", "aten::negative")
def _neg(rows: Rows, node: Node, call: Call) -> Form:
    form = rows.operand(call["self"])
    return replace(form, poly=algebra.mul(form.poly, algebra.constant(-1)))


@handles("aten::clamp", "aten::clamp_min", "aten::clip")
def _clamp(rows: Rows, node: Node, call: Call) -> Form:
    if call.get("max") is not None:
        raise Outside
    form = rows.operand(call["self"])
    return replace(form, poly=algebra.clamp(form.poly, _number(call["min"])))


@handles("aten::relu")
def _relu(rows: Rows, node: Node, call: Call) -> Form:
    form = rows.operand(call["self"])
    return replace(form, poly=algebra.clamp(form.poly, 0.0))


@handles(*COPIES)
def _copy(rows: Rows, node: Node, call: Call) -> Form:
    return rows.operand(call["self"])


@handles(*CASTS)
def _cast(rows: Rows, node: Node, call: Call) -> Form:
    """Casts are the identity, except that a narrowed x is another value than x."""
    form, source, target = rows.operand(call["self"]), value(call["self"]), value(node)
    if source is None or target is None:
        raise Outside
    if algebra.proportional(form.poly, X) and not widens(source.dtype, target.dtype):
        raise Outside
    return form


@handles(*RESHAPES)
def _reshape(rows: Rows, node: Node, call: Call) -> Form:
    """Views that keep the order of entries: adding or removing the reduced axis, or nothing at all."""
    form, source, target = rows.operand(call["self"]), value(call["self"]), value(node)
    if source is None or target is None or call.get("step", 1) != 1:
        raise Outside
    before, after = tuple(source.shape), tuple(target.shape)
    if same_shape(before, after):
        return form
    if not form.poly.per_row:
        raise Outside
    expands = op_name(node) in ("aten::expand", "aten::expand_as", "aten::broadcast_to")
    if expands or len(rows.shape) == 1:
        return form
    dropped = len(after) < len(rows.shape)
    if dropped == form.dropped:
        raise Outside
    return Form(form.poly, dropped)


def _reduced(rows: Rows, node: Node, call: Call) -> tuple[Poly, int, bool]:
    """Operand of a reduction over exactly the axis, its entries there, and whether the axis is dropped."""
    form, source = rows.operand(call["self"]), value(call["self"])
    if source is None or source.ndim != len(rows.shape) or reduced_dims(node) != (rows.dim,):
        raise Outside
    size = source.shape[rows.dim]
    dropped = not call.get("keepdim", False) and source.ndim > 1
    return form.poly, size if isinstance(size, int) else 0, dropped


def _times(p: Poly, size: int) -> Poly:
    if not size:
        raise Outside
    return algebra.mul(p, algebra.constant(size))


@handles("aten::mean.dim", "aten::mean")
def _mean(rows: Rows, node: Node, call: Call) -> Form:
    p, _, dropped = _reduced(rows, node, call)
    return Form(algebra.mean(p), dropped)


@handles("aten::sum.dim_IntList", "aten::sum")
def _sum(rows: Rows, node: Node, call: Call) -> Form:
    p, size, dropped = _reduced(rows, node, call)
    return Form(_times(algebra.mean(p), size), dropped)


@handles(
    "aten::linalg_vector_norm",
    "aten::linalg_norm",
    "aten::norm.ScalarOpt_dim",
    "aten::norm.ScalarOpt_dim_dtype",
)
def _norm(rows: Rows, node: Node, call: Call) -> Form:
    """‖p‖ = sqrt(size · mean(p²))"""
    p, size, dropped = _reduced(rows, node, call)
    order = call.get("ord", call.get("p"))
    if order is not None and _number(order) != 2:
        raise Outside
    return Form(algebra.power(_times(algebra.mean(algebra.power(p, Fraction(2))), size), HALF), dropped)


def _variance(p: Poly, size: int, correction: float) -> Poly:
    """mean((p − mean p)²) · size/(size − correction)"""
    centred = algebra.add(p, algebra.mean(p), -1)
    biased = algebra.mean(algebra.mul(centred, centred))
    if not correction:
        return biased
    if size <= correction:
        raise Outside
    return algebra.mul(biased, algebra.constant(size / (size - correction)))


def _correction(call: Call) -> float:
    if "correction" in call:
        return 1.0 if call["correction"] is None else _number(call["correction"])
    return 1.0 if call.get("unbiased", True) else 0.0


def _spread(n: Fraction, with_mean: bool) -> Handler:
    def handler(rows: Rows, node: Node, call: Call) -> Forms:
        p, size, dropped = _reduced(rows, node, call)
        form = Form(algebra.power(_variance(p, size, _correction(call)), n), dropped)
        return (form, Form(algebra.mean(p), dropped)) if with_mean else form

    return handler


for _overload in ("", ".dim", ".correction"):
    HANDLERS[f"aten::var{_overload}"] = _spread(Fraction(1), False)
    HANDLERS[f"aten::std{_overload}"] = _spread(HALF, False)
    HANDLERS[f"aten::var_mean{_overload}"] = _spread(Fraction(1), True)
    HANDLERS[f"aten::std_mean{_overload}"] = _spread(HALF, True)
