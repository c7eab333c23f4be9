"""Whether this machine computes with bfloat16 operands faster in float32: measured by a few processes, and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from normfx.compat import onednn
from normfx.compat.tracing import disable_current_modes
from normfx.lower import gemm
from normfx.lower.measurements import Pair, least

FILE = "wide"

MARGIN = 1.15
"""A float32 copy of a bfloat16 weight takes twice its memory."""

ROWS = 32
"""Fewest rows: a product of fewer takes the time of reading the weight, which is twice as large in float32."""

QUERIES = 1, 8, 128, 64


def products_are_faster() -> bool:
    """Whether a linear layer in bfloat16 is faster cast to float32, the casts included."""
    return products_speed() > MARGIN


def attention_is_faster() -> bool:
    """Whether attention is faster on float32 operands than on bfloat16 ones."""
    wide, narrow = _attention()
    return narrow / wide > MARGIN


def products_speed() -> float:
    """Speed of a linear layer between casts to float32 and back, relative to the same in bfloat16."""
    wide, narrow = _products()
    return narrow / wide


def products_gain() -> float:
    """Seconds that one multiply-add saves in float32, 0 where it is left in bfloat16."""
    wide, narrow = _products()
    return (narrow - wide) / (gemm.ROWS * gemm.IN * gemm.OUT) if products_are_faster() else 0.0


@functools.cache
def _products() -> Pair:
    """Seconds of a linear layer in float32 between two casts, and of the same in bfloat16; each packed where that is
    faster."""
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight, bias = gemm.layer(torch.bfloat16)
        wide, narrow = _linear(weight.float(), bias.float()), _linear(weight, bias)
        calls = lambda: wide(x.float()).bfloat16(), lambda: narrow(x)
        return least(FILE, "linear layer, float32 and bfloat16", lambda: gemm.best(*calls))


@functools.cache
def _attention() -> Pair:
    """Seconds of attention on float32 and on bfloat16 operands."""
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        narrow = torch.ones(QUERIES, dtype=torch.bfloat16, device="cpu")
        wide = narrow.float()
        calls = (
            lambda: scaled_dot_product_attention(wide, wide, wide),
            lambda: scaled_dot_product_attention(narrow, narrow, narrow),
        )
        return least(FILE, "attention, float32 and bfloat16", lambda: gemm.best(*calls))


def _linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear layer, its weight packed where packed ones of its dtype are."""
    if gemm.packed_is_faster(weight.dtype):
        packed = onednn.pack(weight, gemm.ROWS)
        return lambda x: onednn.linear(x, packed, bias)
    columns = weight.t()
    return lambda x: torch.addmm(bias, x, columns)
