"""What a fresh trace may drop: dead pure code, and the wrapping around constants."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat.operators import OpOverload, schema
from normfx.compat.tensors import FakeTensor
from normfx.graph.effects import unannotated_writes


def simplify_constants(gm: GraphModule) -> None:
    """`torch.tensor(…)` in a forward is traced as constant → lift_fresh_copy → detach_; the last is void
    here.

    A CPU scalar becomes a number in the graph: as an input of the compiled code it would switch CUDA graphs
    off.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default):
        attribute = node.args[0]
        if attribute.op != "get_attr" or not attribute.target.startswith("_tensor_constant"):
            continue
        for user in [u for u in node.users if u.target is torch.ops.aten.detach_.default]:
            user.replace_all_uses_with(node)
            gm.graph.erase_node(user)
        value = getattr(gm, attribute.target)
        if isinstance(value, FakeTensor) or value.dim() or value.device.type != "cpu" or value.is_complex():
            continue
        with gm.graph.inserting_before(node):
            options = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
            number = gm.graph.call_function(torch.ops.aten.full.default, ([], value.item()), options)
        number.meta = dict(node.meta)
        node.replace_all_uses_with(number)
        gm.graph.erase_node(node)


def drop_dead_code(graph: Graph) -> None:
    """Remove nodes without effect, in place.

    fx's own idea of an effect lacks random ops, torch.vmap's switches and in-place methods. `eliminate_dead_code` goes
    by it in the bodies of carried nodes, whatever it is told of the graph itself: they are Dynamo's, and stay.
    """
    for node in reversed(graph.nodes):
        if not node.users and not _must_stay(node):
            graph.erase_node(node)


def _must_stay(node: Node) -> bool:
    """Whether an unused node must be kept: everything but pure, deterministic ops of ATen and normfx, and reads.

    A dead dropout still draws random numbers, and dropping it would change every later draw. A BatchNorm in training
    still moves its running statistics, which its schema does not say.
    """
    if node.op == "get_attr":
        return False
    target = node.target
    if node.op != "call_function":
        return True
    if isinstance(target, OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        known = target.namespace in ("aten", "normfx") and bool(schema(target).returns)
        unbacked = bool(node.meta.get("unbacked_bindings"))
        writes = bool(unannotated_writes(node)) or node.is_impure()
        return random or not known or unbacked or "fractional_max" in schema(target).name or writes
    return not (getattr(target, "__module__", "") == "_operator" and not node.is_impure())
