"""Values of views after what they are views of was replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat import pytree
from normfx.compat.operators import OpOverload, schema
from normfx.compat.tensors import FakeTensor, storage_key
from normfx.graph.calls import fake_result
from normfx.graph.nodes import is_getitem


def settle(gm: GraphModule) -> None:
    """What every pass does that has changed a graph: renews the values of views, checks the graph, writes its code."""
    renew_views(gm.graph)
    gm.graph.lint()
    gm.recompile()


def renew_views(graph: Graph) -> None:
    """Let the values of views share memory with the values that they are views of.

    Fakes share memory where tensors do, and tell what is written, returned or read through which alias. A view whose
    operand was replaced still shares memory with the value that the operand had.
    """
    for node in graph.nodes:
        if is_getitem(node):
            source: Any = node.args[0]
            values = source.meta.get("val")
            if isinstance(values, (tuple, list)) and isinstance(node.args[1], int):
                node.meta["val"] = values[node.args[1]]
        elif _may_be_view(node) and not shared(node.meta["val"], operands(node)):
            again = _run_again(node)
            if shared(again, operands(node)):
                node.meta["val"] = again


def _run_again(node: Node) -> Any:
    """What a call makes of its operands' values; an in-place one that changes strides or sizes leaves theirs alone."""
    args, kwargs = operands(node)
    if schema(node.target).is_mutable:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
    return fake_result(node.target, args, kwargs)


def operands(node: Node) -> Any:
    """The values of a call's operands."""
    return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))


def shared(result: Any, given: Any) -> frozenset[int]:
    """Memory that plain fakes among results have in common with given ones."""
    return _memory(result) & _memory(given)


def _memory(value: Any) -> frozenset[int]:
    return frozenset(
        storage_key(leaf.untyped_storage())
        for leaf in pytree.tree_leaves(value)
        if type(leaf) is FakeTensor and leaf.layout is torch.strided
    )


def _may_be_view(node: Node) -> bool:
    """Whether the result of a call may share memory with an operand by its op's schema, and has a value to tell."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return False
    if not any(a.alias_info is not None for a in schema(node.target).arguments):
        return False
    return any(type(leaf) is FakeTensor for leaf in pytree.tree_leaves(node.meta.get("val")))
