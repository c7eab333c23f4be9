"""From graph nodes to expressions over the rows of one value along one axis (see algebra.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from normfx.ir.graph import SHAPE_READS, arguments, extent, is_getitem, op_name, tensor, value
from normfx.recognize import algebra
from normfx.recognize.algebra import Outside, Poly, X


@dataclass(frozen=True)
class Form:
    """An expression, and whether its node has lost the axis (a reduction with keepdim=False)."""

    poly: Poly
    dropped: bool = False


Forms: TypeAlias = "Form | tuple[Form, ...]"
Call: TypeAlias = "Mapping[str, Any]"

HALF = Fraction(1, 2)
CASTS = frozenset({
    "aten::to.dtype", "aten::to.dtype_layout", "aten::to.device", "aten::to.other", "aten::to.prim_dtype",
    "aten::_to_copy", "aten::type_as",
})  # fmt: skip
COPIES = frozenset({"aten::contiguous", "aten::clone", "aten::alias"})
RESHAPES = frozenset({
    "aten::unsqueeze", "aten::squeeze.dim", "aten::squeeze.dims", "aten::squeeze",
    "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::view_as", "aten::reshape_as",
    "aten::slice.Tensor", "aten::expand", "aten::expand_as", "aten::broadcast_to",
})  # fmt: skip
LIKE = frozenset({"aten::type_as", "aten::to.other", "aten::expand_as", "aten::view_as", "aten::reshape_as"})
"""Ops that read only the shape or dtype of their second operand."""
REDUCTIONS = frozenset({
    "aten::mean.dim", "aten::mean", "aten::sum.dim_IntList", "aten::sum",
    "aten::var.correction", "aten::var.dim", "aten::var",
    "aten::std.correction", "aten::std.dim", "aten::std",
    "aten::var_mean.correction", "aten::var_mean.dim", "aten::var_mean",
    "aten::std_mean.correction", "aten::std_mean.dim", "aten::std_mean",
    "aten::linalg_vector_norm", "aten::linalg_norm",
    "aten::norm.ScalarOpt_dim", "aten::norm.ScalarOpt_dim_dtype",
})  # fmt: skip


def operands(node: Node) -> list[Node]:
    """Operands whose entries `node` reads."""
    if op_name(node) in LIKE:
        return [arg for arg in node.args[:1] if isinstance(arg, Node)]
    return node.all_input_nodes


def readers(node: Node) -> list[Node]:
    """Users that read entries of `node`."""
    return [user for user in node.users if op_name(user) not in SHAPE_READS and node in operands(user)]


def reduced_dims(node: Node) -> tuple[int, ...]:
    """Dimensions a reduction runs over: non-negative, ascending; () when they are not plain numbers."""
    call = arguments(node)
    val = value(call["self"])
    if val is None:
        return ()
    dims = call.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not all(isinstance(k, int) for k in dims or ()):
        return ()
    return tuple(sorted(k % val.ndim for k in dims)) if dims and val.ndim else tuple(range(val.ndim))


def same_shape(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Equality of shapes without adding guards on symbolic sizes."""
    return len(left) == len(right) and all(extent(a) == extent(b) for a, b in zip(left, right, strict=True))


class Rows:
    """Expressions of the nodes that depend on `x` and parameters alone, per row of `x` along `dim`."""

    def __init__(self, x: Node, dim: int, parameters: frozenset[Node]) -> None:
        val = value(x)
        assert val is not None
        self.x, self.dim, self.val, self.parameters = x, dim, val, parameters
        self.shape = tuple(val.shape)
        self.forms: dict[Node, Forms] = {x: Form(algebra.atom(X))}

    @property
    def size(self) -> int:
        """Entries a row has; 0 when symbolic."""
        size = self.shape[self.dim]
        return size if isinstance(size, int) else 0

    def poly(self, node: Node) -> Poly | None:
        form = self.forms.get(node)
        return form.poly if isinstance(form, Form) else None

    def is_full(self, node: Node) -> bool:
        val = value(node)
        return val is not None and same_shape(tuple(val.shape), self.shape)

    def visit(self, node: Node) -> bool:
        """Give `node` its expression; False when it has none."""
        try:
            form = self._form(node)
        except Outside:
            return False
        self.forms[node] = form
        return True

    def _form(self, node: Node) -> Forms:
        if is_getitem(node):
            tensors, index = self.forms.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
            if isinstance(tensors, tuple) and isinstance(index, int):
                return tensors[index]
            raise Outside
        name = op_name(node)
        handler = HANDLERS.get(name)
        if handler is None:
            raise Outside
        form = handler(self, node, arguments(node))
        if isinstance(form, Form) and not self._fits(node, form):
            raise Outside
        return form

    def _fits(self, node: Node, form: Form) -> bool:
        """The node's shape is what its expression promises: no broadcast against anything but the rows."""
        val = value(node)
        if val is None or not val.dtype.is_floating_point or val.device != self.val.device:
            return False
        dropped = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        if form.dropped:
            return same_shape(tuple(val.shape), dropped)
        if len(self.shape) == 1 and form.poly.per_row and val.ndim == 0:
            return True
        kept = (*self.shape[: self.dim], 1, *self.shape[self.dim + 1 :])
        full = same_shape(tuple(val.shape), self.shape)
        return full or (self._single(form.poly) and same_shape(tuple(val.shape), kept))

    def _single(self, poly: Poly) -> bool:
        """Whether an expression has one number a row: parameters in it are single numbers."""
        atoms = [atom for monomial, _ in poly.terms for atom, _ in monomial]
        return X not in atoms and all(tensor(a).numel() == 1 for a in atoms if isinstance(a, Node))

    def operand(self, arg: object) -> Form:
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return Form(algebra.constant(arg))
        if not isinstance(arg, Node):
            raise Outside
        form = self.forms.get(arg)
        if isinstance(form, Form):
            return form
        if arg in self.parameters and self._broadcasts(arg):
            return Form(algebra.atom(arg))
        raise Outside

    def _broadcasts(self, parameter: Node) -> bool:
        """One number, or one number for each entry of a row."""
        val = value(parameter)
        if val is None or not val.dtype.is_floating_point or val.ndim > len(self.shape):
            return False
        if val.device != self.val.device and val.ndim > 0:
            return False
        first = len(self.shape) - val.ndim
        sizes = {first + k: extent(n) for k, n in enumerate(val.shape)}
        along = sizes.pop(self.dim, 1)
        return along in (1, extent(self.shape[self.dim])) and all(n == 1 for n in sizes.values())

    def pair(self, left: object, right: object) -> tuple[Poly, Poly, bool]:
        """Two operands of an elementwise op; values with and without the axis do not mix."""
        a, b = self.operand(left), self.operand(right)
        kinds = {f.dropped for f in (a, b) if f.poly.number is None}
        if len(kinds) > 1:
            raise Outside
        return a.poly, b.poly, kinds == {True}


Handler: TypeAlias = "Callable[[Rows, Node, Call], Forms]"
HANDLERS: dict[str, Handler] = {}


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


def widens(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.promote_types(source, target) == target


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
