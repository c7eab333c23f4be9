"""Attention as torch computes it on a CPU: one op, which keeps no matrix of scores."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from normfx.compat.operators import OpOverload


@functools.cache
def flash() -> OpOverload:
    """aten::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask, scale) ->
    (output, logsumexp): what `scaled_dot_product_attention` on a CPU becomes where no matrix of scores is wanted."""
    op: OpOverload = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return op


@functools.cache
def _follows_query() -> bool:
    """Whether torch's output lies in memory as the queries do (2.14 and newer), not token by token in any case."""
    query = torch.empty(2, 3, 5, 8, device="meta")
    return bool(flash()(query, query, query)[0].stride() == query.stride())


def empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors as torch's op returns for values as wide as the queries: an output, and sums in float32."""
    sequences, heads, queries, wide = query.shape
    if _follows_query():
        out = torch.empty_like(query)
    else:
        out = query.new_empty(sequences, queries, heads, wide).transpose(1, 2)
    return out, query.new_empty((sequences, queries, heads), dtype=torch.float32).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and log Σ exp of the scores, without dropout."""
    output, sums = flash()(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return output, sums
