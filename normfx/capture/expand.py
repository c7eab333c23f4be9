"""Ops that hide norms inside, spelled out in plain ATen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.capture.cleanup import drop_dead_code
from normfx.compat import pytree
from normfx.compat.operators import ENCODER_LAYER
from normfx.compat.tensors import FakeTensor
from normfx.compat.tracing import enable_python_dispatcher
from normfx.graph.regions import replayed_modes

SRC_MASK, KEY_PADDING_MASK, FULL_MASK = 0, 1, 2
"""`mask_type` of `_transformer_encoder_layer_fwd`: (T, T), (B, T) or (B, heads, T, T), true or nonzero is
masked.
"""

_COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")


def expand_encoder_layers(gm: GraphModule) -> int:
    """Replace `_transformer_encoder_layer_fwd`, the no-grad fast path of `nn.TransformerEncoderLayer`, which
    hides two norms, by the ops it stands for; returns how many were replaced.

    It stays whole for nested tensors, empty batches, and under autocast: the op computes in the dtype of its
    arguments there, the ops it stands for would not.
    """
    count = 0
    if not gm.graph.find_nodes(op="call_function", target=ENCODER_LAYER):
        return 0
    with replayed_modes(gm.graph) as nodes:
        for node in nodes:
            if node.op == "call_function" and node.target is ENCODER_LAYER and _expandable(node):
                _inline(gm, node)
                count += 1
    return count


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int,
    qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """What `aten::_transformer_encoder_layer_fwd` computes, (B, T, embed_dim) to the same."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias)
        return F.linear(_attend(qkv, num_heads, mask, mask_type), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = attention(norm_1(src)) + src
        return feed_forward(norm_2(x)) + x
    x = norm_1(attention(src) + src)
    return norm_2(feed_forward(x) + x)


def _attend(qkv: Tensor, num_heads: int, mask: Tensor | None, mask_type: int | None) -> Tensor:
    """Self attention over a packed (B, T, 3D) projection, back to (B, T, D)."""
    query, key, value = (torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    masked = mask.to(torch.bool)
    if mask_type == SRC_MASK:
        masked = masked[None, None]
    elif mask_type == KEY_PADDING_MASK:
        masked = masked[:, None, None]
    context = F.scaled_dot_product_attention(query, key, value, masked.logical_not())
    # a row with every key masked: the op's softmax gives NaN, this attention gives 0
    context = context.masked_fill(masked.all(-1, keepdim=True), float("nan"))
    return context.transpose(1, 2).flatten(2)


def _expandable(node: Node) -> bool:
    src, mask, mask_type = _vals((*node.args, None, None)[:20])[0], *_mask(node)
    if not isinstance(src, FakeTensor) or src.is_nested or src.dim() != 3:
        return False
    if any(isinstance(d, int) and d == 0 for d in src.shape) or torch.is_autocast_enabled(src.device.type):
        return False
    dims = {SRC_MASK: 2, KEY_PADDING_MASK: 2, FULL_MASK: 4}
    return mask is None or mask.dim() == dims.get(mask_type, -1)


def _mask(node: Node) -> tuple[Any, Any]:
    args = [*node.args, None, None]
    mask, mask_type = node.kwargs.get("mask", args[18]), node.kwargs.get("mask_type", args[19])
    return _vals(mask), mask_type


def _vals(args: Any) -> Any:
    return pytree.tree_map_only(Node, lambda n: n.meta["val"], args)


def _inline(gm: GraphModule, node: Node) -> None:
    """Trace `encoder_layer` on the fakes of the node's arguments and put the trace in the node's place."""
    flat, spec = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
    operands = [n for n in flat if isinstance(n, Node)]
    mode = operands[0].meta["val"].fake_mode

    def layer(*fakes: Tensor) -> Tensor:
        remaining = iter(fakes)
        args, kwargs = pytree.tree_unflatten([next(remaining) if isinstance(a, Node) else a for a in flat], spec)
        return encoder_layer(*args, **kwargs)

    with mode, enable_python_dispatcher(), torch.no_grad():
        body = make_fx(layer, pre_dispatch=True)(*(n.meta["val"] for n in operands))
    drop_dead_code(body.graph)
    places = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(body.graph, places)
    for copy in places.values():
        if copy not in operands:
            copy.meta.update({k: node.meta[k] for k in _COPIED_META if k in node.meta})
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
