"""What no subgraph may be matched across: writes in place, and borders of autocast and grad-mode regions."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import torch
from torch.fx import Graph, Node

ENTER = ("_enter_autocast", "_enter_inference_mode")
EXIT = ("_exit_autocast", "_exit_inference_mode")
SET_GRAD = "_set_grad_enabled"


def regions(graph: Graph) -> Mapping[Node, Hashable]:
    """The region of each node: nodes of equal regions run under the same grad mode, autocast and inference mode.

    The mode outside is not in the graph: what the first change sets is taken to differ from it. Where that is wrong,
    equal regions merely look different.
    """
    changes = [node for node in graph.nodes if _callee(node) == SET_GRAD]
    grad: object = not changes[0].args[0] if changes else None
    entered: tuple[Node, ...] = ()
    result: dict[Node, Hashable] = {}
    for node in graph.nodes:
        callee = _callee(node)
        if callee == SET_GRAD:
            grad = node.args[0]
        elif callee in ENTER:
            entered = (*entered, node)
        elif callee in EXIT:
            entered = tuple(n for n in entered if n is not node.args[0])
        result[node] = (grad, entered)
    return result


def _callee(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def written(graph: Graph) -> frozenset[Node]:
    """Nodes whose memory an op changes after they were computed, through themselves or through a view."""
    aliases = _Aliases()
    result: set[Node] = set()
    for node in graph.nodes:
        before = [aliases.group(operand) for operand in _operands(node, write=True)]
        for group in before:
            result.update(group)
        for operand in _operands(node, write=False):
            aliases.join(operand, node)
    return frozenset(result)


class _Aliases:
    """Groups of nodes that may share memory, among the nodes seen so far."""

    def __init__(self) -> None:
        self._groups: dict[Node, set[Node]] = {}

    def group(self, node: Node) -> set[Node]:
        return self._groups.setdefault(node, {node})

    def join(self, first: Node, second: Node) -> None:
        group = self.group(first)
        if group is not self.group(second):
            group |= self.group(second)
            for node in group:
                self._groups[node] = group


def _operands(node: Node, write: bool) -> Iterator[Node]:
    """Operands that `node` writes to, or (write=False) those its result may share memory with."""
    target = node.target
    if node.op != "call_function":
        return
    if not isinstance(target, torch._ops.OpOverload):
        if not write and getattr(target, "__name__", "") == "getitem" and isinstance(node.args[0], Node):
            yield node.args[0]
        return
    for position, argument in enumerate(target._schema.arguments):
        info = argument.alias_info
        if info is None or (write and not info.is_write):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for operand in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(operand, Node):
                yield operand
