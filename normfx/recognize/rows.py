"""From graph nodes to expressions over the rows of one value along one axis (see algebra.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from normfx.graph.nodes import SHAPE_READS, arguments, extent, is_getitem, op_name, tensor, value
from normfx.recognize import algebra
from normfx.recognize.algebra import Outside, Poly, X


@dataclass(frozen=True)
class Form:
    """An expression, and whether its node has lost the axis (a reduction with keepdim=False)."""

    poly: Poly
    dropped: bool = False


Forms: TypeAlias = "Form | tuple[Form, ...]"
Call: TypeAlias = "Mapping[str, Any]"

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
MEANS = frozenset({"aten::mean.dim", "aten::mean", "aten::sum.dim_IntList", "aten::sum"})
REDUCTIONS = MEANS | frozenset({
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


def widens(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.promote_types(source, target) == target


class Rows:
    """Expressions of the nodes that depend on `x` and parameters alone, per row of `x` along `dim`."""

    def __init__(self, x: Node, dim: int, parameters: frozenset[Node], handlers: Mapping[str, Handler]) -> None:
        val = value(x)
        assert val is not None
        self.x, self.dim, self.val, self.parameters, self.handlers = x, dim, val, parameters, handlers
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
        handler = self.handlers.get(name)
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
"""What the expression of a node is, from those of its operands; raises Outside where it has none."""
