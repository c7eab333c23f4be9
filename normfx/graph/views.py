"""Values of views after what they are views of was replaced."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat import pytree
from normfx.compat.operators import OpOverload, schema
from normfx.compat.tensors import FakeTensor, FakeTensorMode, storage_key
from normfx.compat.tracing import enable_python_dispatcher
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
        elif (fake := _possible_view(node)) is not None and not shared(node.meta["val"], operands(node)):
            again = run_again(node, fake.fake_mode)
            if shared(again, operands(node)):
                node.meta["val"] = again


def run_again(node: Node, mode: FakeTensorMode, values: Mapping[Node, Any] = MappingProxyType({})) -> Any:
    """What the op of a call makes of its operands' values. No guard is added, and the values stay as they are.

    values: of operands; those that are given here replace what the graph records
    """
    target: Any = node.target
    args, kwargs = operands(node, values)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode.shape_env.suppress_guards())
        if schema(target).is_mutable:
            # detached: an op that changes strides or sizes must not change what was recorded
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
        return target(*args, **kwargs)


def operands(node: Node, values: Mapping[Node, Any] = MappingProxyType({})) -> Any:
    """The values of a call's operands; `values` go before their own."""
    return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else n.meta.get("val"))


def shared(result: Any, given: Any) -> frozenset[int]:
    """Memory that plain fakes among results have in common with given ones."""
    return _memory(result) & _memory(given)


def _memory(value: Any) -> frozenset[int]:
    return frozenset(
        storage_key(leaf.untyped_storage())
        for leaf in pytree.tree_leaves(value)
        if type(leaf) is FakeTensor and leaf.layout is torch.strided
    )


def _possible_view(node: Node) -> FakeTensor | None:
    """A result of a call whose op, by its schema, may return memory of an operand; None for other calls."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return None
    if not any(argument.alias_info is not None for argument in schema(node.target).arguments):
        return None
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return next((leaf for leaf in leaves if type(leaf) is FakeTensor), None)
