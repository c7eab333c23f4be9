"""Which calls of a Dynamo graph are torch's own on plain tensors, so that a trace shows all that they do.

Everything else is opaque: functions that Dynamo was told not to look into (`torch.compiler.allow_in_graph`,
`nonstrict_trace`), operators from other libraries, and whatever touches a tensor subclass. Traced, such a function
would lose its custom gradients, hooks and checkpoints, and a subclass its inner tensors; and the user's code would run
more often than it does without normfx.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.fx import Node

from normfx.compat import pytree
from normfx.compat.operators import HigherOrderOperator, OpOverload, OpOverloadPacket, namespace
from normfx.compat.tensors import FakeTensor

CARRIED = "normfx_carried"
"""Key in the meta of a node that capture copied without running it."""

APART = "normfx_apart"
"""Key in the meta of such a node in a graph of which other processes, that take part, may not do the same."""

PYTHON_HOMES = frozenset(
    {
        "einops._torch_specific",  # einops puts its own functions into graphs: reshapes, permutes, reductions
        "einops.einops",
        "einops.packing",
        "torch",
        "torch._dynamo.utils",
        "torch._jit_internal",  # torch.nn.functional.max_pool2d and the like choose a variant there
        "torch._linalg_utils",
        "torch._lowrank",
        "torch._prims_common",
        "torch._tensor",
        "torch._utils",
        "torch.functional",
        "torch.fx.experimental.sym_node",
        "torch.fx.experimental.symbolic_shapes",
        "torch.masked._ops",
        "torch.nn.functional",
        "torch.nn.grad",
        "torch.nn.init",
        "torch.signal.windows.windows",
        "torch.sparse",
    }
)
"""Modules whose Python functions were read: they call ATen ops and each other, and nothing that acts on autograd."""

NATIVE_HOMES = frozenset(
    {"torch", "math", "builtins", "_operator"}
    | {
        f"torch._C.{name}"
        for name in ("_fft", "_linalg", "_nested", "_nn", "_sparse", "_special", "_VariableFunctions")
    }
)
"""Modules whose compiled functions are ATen ops or arithmetic on numbers."""

OP_NAMESPACES = frozenset({"aten", "prim", "prims", "normfx"})
"""Namespaces whose operators have no Python of a user's in them."""

WRAPPING_HOMES = ("torch.distributed.tensor.", "torch.nested.")
"""Where the Python functions live that put tensors into a subclass and take them out: they write to nothing."""

TAKES_MESSAGE = frozenset({"_assert", "_check", "_check_is_size", "_check_value", "_check_with"})
"""Functions of torch that may be given a function for the text of an error. Any other may call what it is given."""

FUNCTORCH = ("torch._functorch", "torch._C._functorch")
"""Where the switches of torch.vmap and torch.func live."""

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)


def calls_unknown(node: Node) -> bool:
    """Whether a node of a Dynamo graph or a canonical graph calls a function that is not known to be torch's own.

    Operators, higher-order or not, are not counted: they say in their schema, or in their subgraphs, what they do.
    """
    target = node.target
    if node.op != "call_function" or isinstance(target, (HigherOrderOperator, OpOverload, OpOverloadPacket)):
        return False
    if any(isinstance(leaf, types.FunctionType) for leaf in pytree.arg_tree_leaves(*node.args, **node.kwargs)):
        return getattr(target, "__name__", "") not in TAKES_MESSAGE
    return not _is_known(target)


def only_wraps(node: Node) -> bool:
    """Whether an unknown function is one of torch's that turns tensors into a subclass, or back."""
    return str(getattr(node.target, "__globals__", {}).get("__name__")).startswith(WRAPPING_HOMES)


def is_foreign_op(node: Node) -> bool:
    """Whether a node calls an operator from outside torch, whose fake and autograd formulas are a user's Python."""
    target = node.target
    if isinstance(target, OpOverload):
        return target.namespace not in OP_NAMESPACES
    return isinstance(target, OpOverloadPacket) and namespace(target) not in OP_NAMESPACES


def single_overload(target: Any) -> Any:
    """The overload that an operator without others stands for; any other target as it is."""
    if not isinstance(target, OpOverloadPacket):
        return target
    names = target.overloads()  # type: ignore[no-untyped-call]
    return getattr(target, names[0]) if len(names) == 1 else target


def touches_subclass(node: Node) -> bool:
    """Whether a node of a Dynamo graph reads or makes a tensor that is of a subclass."""
    return any(not is_plain_value(n.meta.get("example_value")) for n in (node, *node.all_input_nodes))


def is_plain_value(value: Any) -> bool:
    """Whether a value holds no tensor of a subclass."""
    return all(type(leaf) in PLAIN_TENSORS for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _is_known(target: Any) -> bool:
    if _home(target).startswith(FUNCTORCH):
        return True
    if isinstance(target, types.FunctionType):  # not __module__, which functools.wraps copies
        return str(target.__globals__.get("__name__")) in PYTHON_HOMES
    if isinstance(target, (types.MethodDescriptorType, types.WrapperDescriptorType)):
        return _home(target.__objclass__) in ("torch._C", "builtins")
    if isinstance(target, (types.BuiltinFunctionType, type)):
        return _home(target) in NATIVE_HOMES
    return _is_numpy(target)


def _is_numpy(target: Any) -> bool:
    """Dynamo's wrapper of a function of torch._numpy, a method of its arrays, or an operator (torch 2.11 to 2.15)."""
    if not type(target).__name__.startswith("numpy_") or _home(type(target)) != "torch._dynamo.utils":
        return False
    inner = getattr(target, "f", None) or getattr(target, "op", None) or getattr(target, "method", None)
    return isinstance(inner, str) or _home(inner).startswith(("torch._numpy", "_operator"))


def _home(target: Any) -> str:
    return getattr(target, "__module__", None) or ""
