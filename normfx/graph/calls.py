"""New calls in a canonical graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from normfx.compat import pytree
from normfx.graph.recompute import inherit
from normfx.graph.shards import own_part
from normfx.ir.fused_ops import NormCall

_INHERITED = ("stack_trace", "nn_module_stack", "seq_nr", "custom")


def add_call(graph: Graph, op: Any, args: tuple[Any, ...], like: Node, **named: Any) -> Node:
    """A call where the graph inserts, its fake value computed; its module path, source line and part in a checkpointed
    region are those of `like`."""
    node = graph.call_function(op, args, named)
    node.meta["val"] = fake_result(op, args, named)
    for key in _INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    inherit(node, like)
    return node


def add_norm(graph: Graph, call: NormCall, like: Node) -> Node:
    """Write a canonical norm into a graph."""
    return add_call(graph, call.op, call.args, like)


def fake_result(op: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What an op makes of the fakes of its arguments; at least one of them is a tensor."""
    fakes, fake_named = torch.fx.node.map_arg((args, dict(named)), lambda n: n.meta["val"])
    tensors: list[Any] = [leaf for leaf in pytree.tree_leaves((fakes, fake_named)) if isinstance(leaf, torch.Tensor)]
    with own_part(tensors[0]).fake_mode, torch.no_grad():
        return op(*fakes, **fake_named)
