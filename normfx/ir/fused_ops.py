"""Canonical norms with the residual add they read, and with the norm before that add; and all canonical norms as calls.

    add_*_norm      s = x + α·residual,  y = norm(s)
    norm_add_norm   s = norm₁(x) + α·residual,  y = norm₂(s)

Each gives (y, s). Their bodies are those of ir/ops.py, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from normfx.compat.operators import OpOverload
from normfx.ir import ops
from normfx.ir.form import FIELDS, Form, schema
from normfx.ir.ops import define

Operand: TypeAlias = Any
"""A node of a graph, or a tensor."""


@dataclass(frozen=True)
class Inner:
    """The norm before an add."""

    weight: Operand | None
    bias: Operand | None
    form: Form


@dataclass(frozen=True)
class NormCall:
    """A canonical norm: of x, of x + alpha·residual, or of inner(x) + alpha·residual."""

    x: Operand
    weight: Operand | None
    bias: Operand | None
    form: Form
    residual: Operand | None = None
    alpha: float = 1.0
    inner: Inner | None = None

    @property
    def vectors(self) -> tuple[Operand | None, ...]:
        inner = (self.inner.weight, self.inner.bias) if self.inner else ()
        return (*inner, self.weight, self.bias)

    @property
    def forms(self) -> tuple[Form, ...]:
        return (*((self.inner.form,) if self.inner else ()), self.form)

    @property
    def op(self) -> OpOverload:
        if self.inner is not None:
            return NORM_ADD_NORM
        plain = ops.NORMS[self.form.kind]
        return plain if self.residual is None else ADDS[plain]

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the op."""
        kinds = tuple(form.kind for form in self.forms) if self.inner else ()
        flat = [field for form in self.forms for field in form.arguments]
        if self.residual is None:
            return (self.x, *self.vectors, *flat)
        return (self.x, self.residual, *self.vectors, self.alpha, *kinds, *flat)


def call_of(op: object, args: Sequence[Any]) -> NormCall:
    """The call of a canonical norm with these arguments."""
    if op in KINDS:
        x, weight, bias, *form = args
        return NormCall(x, weight, bias, Form(KINDS[op], *form))
    if op is NORM_ADD_NORM:
        x, residual, inner_weight, inner_bias, weight, bias, alpha, inner, outer, *forms = args
        half = len(FIELDS) - 1
        first = Inner(inner_weight, inner_bias, Form(inner, *forms[:half]))
        return NormCall(x, weight, bias, Form(outer, *forms[half:]), residual, alpha, first)
    x, residual, weight, bias, alpha, *form = args
    return NormCall(x, weight, bias, Form(ADD_KINDS[op], *form), residual, alpha)


def norm_call(node: Node) -> NormCall:
    """What a canonical norm computes, with or without an add."""
    return call_of(node.target, node.args)


def _run(call: NormCall) -> tuple[Tensor, Tensor]:
    """The meaning of a norm with an add."""
    x, residual = call.x, call.residual
    assert residual is not None
    if call.inner is not None:
        x = ops.differentiated_norm(x, call.inner.weight, call.inner.bias, call.inner.form)
    total = torch.add(x, residual, alpha=call.alpha)
    return ops.differentiated_norm(total, call.weight, call.bias, call.form), total


def _define(signature: str) -> OpOverload:
    def run(*args: Any) -> tuple[Tensor, Tensor]:
        return _run(call_of(op, args))

    op = define(signature, run)
    BODIES[op] = run
    return op


BODIES: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {}
"""Each op of this module and its body."""
ADDS = {
    op: _define(
        f"add_{kind}(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float alpha, {schema()}) -> "
        "(Tensor, Tensor)"
    )
    for kind, op in ops.NORMS.items()
}
"""Each norm's op that takes in a residual add."""
ADD_RMS_NORM, ADD_LAYER_NORM, ADD_CRMS_NORM = (ADDS[op] for op in (ops.RMS_NORM, ops.LAYER_NORM, ops.CRMS_NORM))
NORM_ADD_NORM = _define(
    "norm_add_norm(Tensor x, Tensor residual, Tensor? inner_weight, Tensor? inner_bias, Tensor? weight, Tensor? bias, "
    f"float alpha, str inner, str outer, {schema('inner_')}, {schema()}) -> (Tensor, Tensor)"
)
KINDS: dict[object, Any] = {op: kind for kind, op in ops.NORMS.items()}
ADD_KINDS: dict[object, Any] = {ADDS[op]: kind for kind, op in ops.NORMS.items()}
CALLS = frozenset({*KINDS, *BODIES})
"""All canonical norms."""
