"""Calls on DTensors as ATen ops.

A trace would write what each process does with its part. So these calls are not traced: those whose meaning is one ATen
op are written as that op, on DTensors, and AOTAutograd finds the parts later, as it does in Dynamo's graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from normfx.compat.distributed import is_distributed, local_of, refaked
from normfx.compat.operators import OpOverload
from normfx.compat.tensors import FakeTensor

aten = torch.ops.aten

Written = tuple[OpOverload, tuple[Any, ...]]


def _linear(input: Any, weight: Any, bias: Any = None) -> Written:
    return aten.linear.default, (input, weight, bias)


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Written:
    return aten.layer_norm.default, (input, list(normalized_shape), weight, bias, eps)


def _add(input: Any, other: Any) -> Written:
    return aten.add.Tensor, (input, other)


_CALLS: dict[Any, Callable[..., Written]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.layer_norm: _layer_norm,
    operator.add: _add,
    torch.add: _add,
}
"""Functions on DTensors, and how they are written. Each was read: it calls this op and no other."""


def written(node: Node) -> Written | None:
    """The ATen op that a call of a Dynamo graph is, on DTensors alone, with its arguments; None for any other call."""
    spell = _CALLS.get(node.target) if node.op == "call_function" else None
    values = [n.meta.get("example_value") for n in (node, *node.all_input_nodes)]
    if spell is None or not all(map(is_distributed, values)):
        return None
    try:
        return spell(*node.args, **node.kwargs)
    except TypeError:  # an argument that is not known here
        return None


def refake(value: Any, fake: Callable[[Any], Any]) -> Any:
    """Fakes of the DTensors that a call returns, to be seen by later stages; None where they cannot be made."""
    return refaked(value, fake) if is_distributed(value) and type(local_of(value)) is FakeTensor else None
