"""LayerNorms with a residual add that a CPU computes faster as `aten.layer_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

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
            total = _call(gm, node, aten.add.Tensor, (given.x, given.residual), alpha=given.alpha)
            size = [shape(given.x)[-1]]
            out = _call(gm, node, aten.layer_norm.default, (total, size, given.weight, given.bias, form.eps))
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


def _call(gm: GraphModule, like: Node, target: Any, args: tuple[Any, ...], **named: Any) -> Node:
    new = gm.graph.call_function(target, args, named)
    new.meta = {k: v for k, v in like.meta.items() if k != "val"}
    fakes: Any = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with fakes[0].fake_mode, torch.no_grad():
        new.meta["val"] = target(*fakes, **named)
    return new
