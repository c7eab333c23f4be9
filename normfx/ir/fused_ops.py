"""Canonical ops of a norm together with the residual add it reads, and with the norm before that add.

    add_*_norm      s = x + α·residual,  y = norm(s)
    norm_add_norm   s = norm₁(x) + α·residual,  y = norm₂(s)

Each gives (y, s). Their bodies are those of ir/ops.py, one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfx.ir import ops
from normfx.ir.ops import FORM_ARGS, Form, define, norm_body

_ADD_ARGS = f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float alpha, {FORM_ARGS}) -> (Tensor, Tensor)"
_INNER_ARGS = ", ".join(f"{kind} inner_{name}" for kind, name in (arg.split() for arg in FORM_ARGS.split(", ")))
_KINDS = {"rms_norm": norm_body(), "layer_norm": norm_body(centre=True), "crms_norm": norm_body(compressed=True)}


class AddNorm(NamedTuple):
    """The arguments of add_*_norm before its form."""

    x: Any
    residual: Any
    weight: Any
    bias: Any
    alpha: float


class NormAddNorm(NamedTuple):
    """The arguments of norm_add_norm before its forms: those of the first norm, then those of the second. inner, outer:
    "rms_norm", "layer_norm", or for outer "crms_norm"."""

    x: Any
    residual: Any
    inner_weight: Any
    inner_bias: Any
    weight: Any
    bias: Any
    alpha: float
    inner: str
    outer: str


def _add_norm(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    norm = _KINDS[kind]

    def run(
        x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, alpha: float, *form: Any
    ) -> tuple[Tensor, Tensor]:
        total = torch.add(x, residual, alpha=alpha)
        return norm(total, weight, bias, *form), total

    return run


def _norm_add_norm(*args: Any) -> tuple[Tensor, Tensor]:
    count = len(NormAddNorm._fields)
    given, forms = NormAddNorm(*args[:count]), args[count:]
    half = len(Form._fields)
    inner = _KINDS[given.inner](given.x, given.inner_weight, given.inner_bias, *forms[:half])
    total = torch.add(inner, given.residual, alpha=given.alpha)
    return _KINDS[given.outer](total, given.weight, given.bias, *forms[half:]), total


ADD_RMS_NORM = define("add_rms_norm" + _ADD_ARGS, _add_norm("rms_norm"))
ADD_LAYER_NORM = define("add_layer_norm" + _ADD_ARGS, _add_norm("layer_norm"))
ADD_CRMS_NORM = define("add_crms_norm" + _ADD_ARGS, _add_norm("crms_norm"))
NORM_ADD_NORM = define(
    "norm_add_norm(Tensor x, Tensor residual, Tensor? inner_weight, Tensor? inner_bias, Tensor? weight, Tensor? bias, "
    f"float alpha, str inner, str outer, {_INNER_ARGS}, {FORM_ARGS}) -> (Tensor, Tensor)",
    _norm_add_norm,
)
ADDS = {
    ops.RMS_NORM: ADD_RMS_NORM,
    ops.LAYER_NORM: ADD_LAYER_NORM,
    ops.CRMS_NORM: ADD_CRMS_NORM,
}
"""Each norm's op that takes in a residual add."""
KINDS = {ops.RMS_NORM: "rms_norm", ops.LAYER_NORM: "layer_norm", ops.CRMS_NORM: "crms_norm"}
BODIES = {
    **{op: _add_norm(KINDS[plain]) for plain, op in ADDS.items()},
    NORM_ADD_NORM: _norm_add_norm,
}
"""Each op of this module and its body."""
