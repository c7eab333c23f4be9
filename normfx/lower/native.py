"""LayerNorms with a residual add that a CPU computes faster as `aten.layer_norm`."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from normfx.ir.calls import add_call
from normfx.ir.fused_ops import ADD_LAYER_NORM, AddNorm
from normfx.ir.graph import grad_modes, shape, tensor
from normfx.ir.ops import Form, accumulation_dtype
from normfx.plan import faster_spelled

aten = torch.ops.aten


def use_native_norms(gm: GraphModule) -> None:
    """Replace add_layer_norm by an add and `aten.layer_norm`, in place, where that is the same and faster."""
    modes = grad_modes(gm.graph)
    for node in gm.graph.find_nodes(op="call_function", target=ADD_LAYER_NORM):
        count = len(AddNorm._fields)
        given, form = AddNorm(*node.args[:count]), Form(*node.args[count:])
        if tensor(given.x).device.type != "cpu" or not _is_native(given, form):
            continue
        if faster_spelled(given.x, modes[node]):
            continue
        with gm.graph.inserting_before(node):
            total = add_call(gm.graph, aten.add.Tensor, (given.x, given.residual), node, alpha=given.alpha)
            args = (total, [shape(given.x)[-1]], given.weight, given.bias, form.eps)
            out = add_call(gm.graph, aten.layer_norm.default, args, node)
        for part in list(node.users):
            part.replace_all_uses_with((out, total)[part.args[1]])
            gm.graph.erase_node(part)
        gm.graph.erase_node(node)
    gm.recompile()


def _is_native(given: AddNorm, form: Form) -> bool:
    """Whether `aten.layer_norm` says what the norm computes."""
    x = tensor(given.x)
    vectors = [tensor(v) for v in (given.weight, given.bias) if v is not None]
    last = form.dim % x.ndim == x.ndim - 1
    plain = form._replace(eps=0.0, dim=0) == Form(0, 0.0, "inside", 0, 1.0, accumulation_dtype(x.dtype), x.dtype, False)
    return last and plain and all(v.dtype == x.dtype and tuple(v.shape) == tuple(x.shape[-1:]) for v in vectors)
