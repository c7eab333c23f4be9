"""LayerNorms that are faster as `aten.layer_norm`: on a CPU some with a residual add, on a GPU all without a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.errors import NormfxError
from normfx.graph.calls import add_call, add_norm
from normfx.graph.nodes import grad_modes, shape, tensor
from normfx.graph.views import settle
from normfx.ir import ops
from normfx.ir.centring import accumulation_dtype
from normfx.ir.form import Form
from normfx.ir.fused_ops import ADD_LAYER_NORM, NORM_ADD_NORM, NormCall, norm_call
from normfx.lower.choice import faster_spelled

aten = torch.ops.aten


def use_native_norms(gm: GraphModule) -> None:
    """LayerNorms become `aten.layer_norm`, in place, where that is the same and faster.

    On a GPU Inductor computes mean and variance of `aten.layer_norm` in one loop over a row that does not fit into
    registers, and in two of the canonical form.
    """
    graph, modes = gm.graph, grad_modes(gm.graph)
    for node in graph.find_nodes(op="call_function", target=NORM_ADD_NORM):
        if _wins(node, modes[node]):
            modes[_apart(graph, node)] = modes[node]
    for node in graph.find_nodes(op="call_function", target=ADD_LAYER_NORM):
        call = norm_call(node)
        if not _wins(node, modes[node]) or not _is_native(call.x, call.weight, call.bias, call.form):
            continue
        with graph.inserting_before(node):
            total = add_call(graph, aten.add.Tensor, (call.x, call.residual), node, alpha=call.alpha)
            out = _native(graph, total, call.weight, call.bias, call.form, node)
        for part in list(node.users):
            index: Any = part.args[1]
            part.replace_all_uses_with((out, total)[index])
            graph.erase_node(part)
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=ops.LAYER_NORM):
        call = norm_call(node)
        if tensor(node).device.type != "cpu" and _is_native(call.x, call.weight, call.bias, call.form):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_native(graph, call.x, call.weight, call.bias, call.form, node))
            graph.erase_node(node)
    settle(gm)


def write_as_aten(gm: GraphModule) -> None:
    """Norms become `aten.layer_norm` and `aten.rms_norm`, in place, where these compute the same.

    For graphs that leave the process: ONNX has an op for each.
    """
    graph = gm.graph
    for op in (ops.LAYER_NORM, ops.RMS_NORM):
        for node in graph.find_nodes(op="call_function", target=op):
            call = norm_call(node)
            if not _is_plain(call.x, call.weight, call.bias, call.form):
                continue
            with graph.inserting_before(node):
                if op is ops.LAYER_NORM:
                    out = _native(graph, call.x, call.weight, call.bias, call.form, node)
                else:
                    out = _root_mean_square(graph, call, node)
            node.replace_all_uses_with(out)
            graph.erase_node(node)
    settle(gm)


def _root_mean_square(graph: Graph, call: NormCall, like: Node) -> Node:
    """`aten.rms_norm`, which has no bias, and the bias."""
    args = (call.x, [shape(call.x)[-1]], call.weight, call.form.eps)
    out = add_call(graph, aten.rms_norm.default, args, like)
    return out if call.bias is None else add_call(graph, aten.add.Tensor, (out, call.bias), like)


def _wins(node: Node, records: bool) -> bool:
    x: Any = node.args[0]
    return tensor(x).device.type != "cpu" or not faster_spelled(x, records)


def _apart(graph: Graph, node: Node) -> Node:
    """Write norm_add_norm as its first norm and an op for the rest, if either norm is an `aten.layer_norm`."""
    call = norm_call(node)
    inner = call.inner
    assert inner is not None
    first = _is_native(call.x, inner.weight, inner.bias, inner.form)
    if not first and not _is_native(call.x, call.weight, call.bias, call.form):
        return node
    with graph.inserting_before(node):
        if first:
            x = _native(graph, call.x, inner.weight, inner.bias, inner.form, node)
        else:
            x = add_norm(graph, NormCall(call.x, inner.weight, inner.bias, inner.form), node)
        new = add_norm(graph, replace(call, x=x, inner=None), node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _native(graph: Graph, x: Node, weight: Node | None, bias: Node | None, form: Form, like: Node) -> Node:
    if form.kind != "layer_norm":
        raise NormfxError(
            f"normfx: a norm of kind {form.kind} would be written as a LayerNorm; please report this graph"
        )
    return add_call(graph, aten.layer_norm.default, (x, [shape(x)[-1]], weight, bias, form.eps), like)


def _is_native(x: Node, weight: Node | None, bias: Node | None, form: Form) -> bool:
    """Whether `aten.layer_norm` says what a norm of values like x computes."""
    return form.kind == "layer_norm" and _is_plain(x, weight, bias, form)


def _is_plain(x: Node, weight: Node | None, bias: Node | None, form: Form) -> bool:
    """Whether ATen has an op for a norm of values like x: `aten.layer_norm`, or `aten.rms_norm` and a bias after it."""
    like = tensor(x)
    vectors = [tensor(v) for v in (weight, bias) if v is not None]
    whole = all((v.dtype, tuple(v.shape)) == (like.dtype, tuple(like.shape[-1:])) for v in vectors)
    last = form.dim % like.ndim == like.ndim - 1
    plain = Form(form.kind, form.dim, form.eps, "inside", 0, 1.0, accumulation_dtype(like.dtype), like.dtype)
    if form.kind == "rms_norm" and bias is not None:  # added to what was rounded
        whole = whole and form.compute_dtype == form.out_dtype
    return last and whole and form == plain and not form.compressed
