"""Operators of torch.ops: their classes, schemas and kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["HigherOrderOperator", "OpOverload", "OpOverloadPacket"]

ENCODER_LAYER: OpOverload = torch.ops.aten._transformer_encoder_layer_fwd.default
"""The fast path of `nn.TransformerEncoderLayer` without gradients."""


def schema(op: Any) -> torch.FunctionSchema:
    """The schema of an OpOverload."""
    found: torch.FunctionSchema = op._schema
    return found


def base_name(op: OpOverload) -> str:
    """'add_' of aten::add_.Tensor."""
    return schema(op).name.split("::")[1]


def namespace(packet: OpOverloadPacket) -> str:
    """'aten' of torch.ops.aten.add."""
    return packet._qualified_op_name.split("::")[0]


def overload(packet: Any, like: OpOverload) -> Any:
    """The overload of a packet that has the name of another operator's; None where it has none."""
    return getattr(packet, like._overloadname, None)


def has_kernel(op: OpOverload, *keys: str) -> bool:
    """Whether a kernel is registered for one of the dispatch keys."""
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(str(op._name), key) for key in keys)
