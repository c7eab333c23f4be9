"""Short tensors of numbers, written so that Inductor knows the numbers."""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.node import Argument

from normfx.compat.tensors import FakeTensor
from normfx.graph.regions import attribute

LONGEST = 8
"""Entries of a vector that Inductor writes into its code."""


def write_small_constants(gm: GraphModule) -> None:
    """Write copies of short vectors that the trace has seen as the `torch.tensor(…)` that they come from, in place.

    An attribute of the graph becomes an input of the compiled code: an index whose numbers are in the code needs no
    check of its bounds, and no load.
    """
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default):
        held = node.args[0]
        if held.op != "get_attr" or not str(held.target).startswith("_tensor_constant"):
            continue
        tensor = attribute(gm, str(held.target))
        if isinstance(tensor, FakeTensor) or type(tensor) is not torch.Tensor or not _is_short(tensor):
            continue
        with gm.graph.inserting_before(node):
            options: dict[str, Argument] = {"dtype": tensor.dtype, "device": tensor.device}
            made = gm.graph.call_function(torch.tensor, (tensor.tolist(),), options)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
        if not held.users:
            gm.graph.erase_node(held)
        changed = True
    if changed:
        gm.recompile()


def _is_short(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad
    return plain and tensor.dim() == 1 and tensor.shape[0] <= LONGEST and not tensor.is_complex()
