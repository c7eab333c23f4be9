"""What a captured graph must hold to: every value comes from a node, an input or a real attribute.

A trace that loses a value makes a constant of it, and the constant of a trace on fakes is a fake: a crash at the first
call at best. And what acts on autograd's state is taken out again where that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat import pytree
from normfx.compat.tensors import FakeTensor, is_traceable_wrapper_subclass
from normfx.compat.tracing import GET_DATA
from normfx.errors import NormfxError
from normfx.graph.aliasing import may_leave, mutated, storages_of
from normfx.graph.names import source_line
from normfx.graph.nodes import grad_modes
from normfx.graph.regions import acts_on_autograd, attribute

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def check_producers(gm: GraphModule) -> None:
    """Raise NormfxError where a value has no producer: a fake among the attributes, or a tensor or symbol that stands
    itself in the arguments of a node."""
    for node in gm.graph.nodes:
        lost = any(
            isinstance(arg, (torch.Tensor, *SYMBOLIC)) for arg in pytree.arg_tree_leaves(*node.args, **node.kwargs)
        )
        if node.op == "get_attr":
            lost = any(isinstance(leaf, FakeTensor) for leaf in _inner(attribute(gm, str(node.target))))
        if lost:
            reader = next(iter(node.users), node) if node.op == "get_attr" else node
            where = source_line(reader) or reader.name
            raise NormfxError(f"normfx: the trace does not follow a value that is read at {where}")


def _inner(value: Any) -> Iterator[Any]:
    """A tensor, or the plain tensors in a subclass."""
    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _inner(getattr(value, name))
    else:
        yield value


def settle_autograd_state(graph: Graph) -> None:
    """Take out `requires_grad_()` where no gradient is recorded afterwards and its value stays in the graph; and make
    `.data` a `detach` where neither its value nor the memory is written to or handed out, so that nothing can observe
    the difference."""
    found = [node for node in graph.nodes if acts_on_autograd(node)]
    if not found:
        return
    modes, storages, written = grad_modes(graph), storages_of(graph), mutated(graph)
    for node in found:
        operand = node.args[0]
        assert isinstance(operand, Node)
        if may_leave(operand, storages):
            continue
        if node.target is GET_DATA:
            if node not in written:
                node.target = torch.ops.aten.detach.default
        elif not any(modes[later] for later in _after(graph, node)):
            node.replace_all_uses_with(operand)
            graph.erase_node(node)


def _after(graph: Graph, node: Node) -> Iterator[Node]:
    seen = False
    for other in graph.nodes:
        seen = seen or other is node
        if seen:
            yield other
