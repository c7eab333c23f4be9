"""Which modes a node runs under, and which nodes were copied from Dynamo's graph without being traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from normfx.compat.operators import HigherOrderOperator
from normfx.compat.tracing import GET_DATA, enter_autocast, exit_autocast, set_grad_enabled
from normfx.graph.opaque import CARRIED, FUNCTORCH, calls_unknown, is_foreign_op, touches_subclass

MODE_SWITCHES = frozenset(
    {
        "_enter_autocast",
        "_exit_autocast",
        "_set_grad_enabled",
        "_enter_inference_mode",
        "_exit_inference_mode",
    }
)
"""Names of the functions that switch autocast, grad or inference mode in the middle of a graph."""


UNTRACEABLE = frozenset({"retain_grad", "register_hook", "backward", "set_"})
"""Tensor methods that act on autograd's state and leave no node in a traced graph."""

REQUIRE_GRAD = "requires_grad_"
"""A method that a trace does not see either. Capture writes its node."""

AUTOGRAD_CALLS = (torch.autograd.grad, torch.autograd.backward)
"""What Dynamo's `trace_autograd_ops` leaves in a graph: a trace would differentiate the fakes."""


def is_traceable(node: Node) -> bool:
    """Whether a node of Dynamo's graph may be run under a trace."""
    return not (node.op == "call_method" and node.target in UNTRACEABLE) and node.target not in AUTOGRAD_CALLS


def acts_on_autograd(node: Node) -> bool:
    """Whether a node reads or writes autograd's state of its operand and returns the same memory."""
    return node.target is GET_DATA or (node.op == "call_method" and node.target == REQUIRE_GRAD)


def target_name(node: Node) -> str:
    """Name of the function, method or attribute a node refers to."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def attribute(root: Any, path: str) -> Any:
    """What a `get_attr` node with this target reads."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def is_mode_switch(node: Node) -> bool:
    return node.op == "call_function" and target_name(node) in MODE_SWITCHES


def modes_along(graph: Graph, grad: bool | None) -> Iterator[tuple[Node, bool | None, tuple[Node, ...]]]:
    """Each node with the gradient mode it runs under and the autocast and inference regions that it is in, each by the
    node that enters it; a switch counts as what it leads to. grad: the mode around the graph, None if it is unknown."""
    entered: tuple[Node, ...] = ()
    outside: dict[Any, bool | None] = {}
    for node in graph.nodes:
        if is_mode_switch(node):
            name = target_name(node)
            if name == "_set_grad_enabled":
                grad = bool(node.args[0])
            elif name.startswith("_enter"):
                entered, outside[node] = (*entered, node), grad
                if name == "_enter_inference_mode" and node.args and node.args[0]:
                    grad = False
            else:
                entered = tuple(n for n in entered if n is not node.args[0])
                if name == "_exit_inference_mode":
                    grad = outside.get(node.args[0], grad)
        yield node, grad, entered


def is_opaque(node: Node) -> bool:
    """Whether a node calls a function that may do anything: write to its arguments, return one, act on autograd."""
    return calls_unknown(node) and not is_mode_switch(node) and not acts_on_autograd(node)


def is_autocast(graph: Graph) -> bool:
    """Whether any of the graph may run under autocast."""
    inside = any(target_name(node) == "_enter_autocast" for node in graph.nodes)
    return inside or any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def carried(graph: Graph) -> set[Node]:
    """Nodes that are copied, not traced: higher-order ops, module calls, what is opaque or marked as carried, and
    everything inside a functorch level.

    In torch 2.13 and 2.15 a level begins at `_vmap_increment_nesting` and its siblings and ends at the
    decrement.
    """
    found: set[Node] = set()
    depth = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name, home = target_name(node), getattr(node.target, "__module__", None) or ""
        if name.endswith("_increment_nesting") or name == "_enter_dual_level":
            depth += 1
        higher = isinstance(node.target, HigherOrderOperator) or node.op == "call_module"
        functorch = depth or home.startswith(FUNCTORCH)
        if functorch or higher or is_opaque(node) or CARRIED in node.meta:
            found.add(node)
        if name.endswith("_decrement_nesting") or name == "_exit_dual_level":
            depth -= 1
    return found


def untraced(graph: Graph) -> set[Node]:
    """Nodes of a Dynamo graph that capture copies without running them: the carried ones, and those that run a
    user's Python: operators from outside torch, and everything that touches a tensor subclass."""
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method") and not is_mode_switch(node)]
    return carried(graph) | {node for node in calls if is_foreign_op(node) or touches_subclass(node)}


@contextmanager
def replayed_modes(graph: Graph) -> Iterator[Iterator[Node]]:
    """Nodes in order; while one is being handled, autocast and grad mode are those it will run under.

    The modes around the call are the ambient ones, and are restored. Inference mode is replayed as no_grad,
    which is all that a fake tensor shows of it.
    """
    entered: dict[Any, Any] = {}
    grad = torch.is_grad_enabled()
    try:
        yield _replay(graph, entered)
    finally:
        for mode in reversed(list(entered.values())):
            if not isinstance(mode, bool):
                exit_autocast(mode)
        set_grad_enabled(grad)


def _replay(graph: Graph, entered: dict[Any, Any]) -> Iterator[Node]:
    for node in list(graph.nodes):
        if not is_mode_switch(node):
            yield node
            continue
        name = target_name(node)
        if name == "_enter_autocast":
            entered[node] = enter_autocast(*node.args)
        elif name == "_exit_autocast":
            exit_autocast(entered.pop(node.args[0]))
        elif name == "_enter_inference_mode":
            entered[node] = torch.is_grad_enabled()
            set_grad_enabled(entered[node] and not (node.args and node.args[0]))
        elif name == "_exit_inference_mode":
            set_grad_enabled(entered.pop(node.args[0]))
        else:
            set_grad_enabled(bool(node.args[0]))
        yield node
