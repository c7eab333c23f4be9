"""Invariants of a canonical graph, checked between stages."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.compat import pytree
from normfx.compat.operators import HigherOrderOperator, OpOverload, schema
from normfx.compat.tensors import FakeTensor, FakeTensorMode
from normfx.errors import VerifyError
from normfx.graph.nodes import memory_order, op_name
from normfx.graph.opaque import is_foreign_op
from normfx.graph.regions import acts_on_autograd, attribute, carried, is_mode_switch, replayed_modes
from normfx.graph.views import operands, run_again, shared

_SCALAR_MODULES = frozenset({math.__name__, operator.__name__, "_operator", "builtins"})

_STORED_BY_MODE = frozenset({"aten::scaled_dot_product_attention"})
"""Ops whose kernel, and with it the layout of the result, the gradient mode chooses: they are run again without it."""

Checked = dict[Node, tuple[Any, ...]]
"""Nodes that agreed with what they compute, and all that this depended on."""


def verify(gm: GraphModule, stage: str, checked: Checked | None = None) -> None:
    """Raise `VerifyError` unless `gm` is a well-formed canonical graph whose `meta['val']` are what its ops
    compute.

    Every op of torch is run again on the fakes of its arguments, under the autocast region it stands in; the ambient
    autocast is the caller's. Dtype, shape, device and, as far as it is known, the order of dimensions in memory are
    compared, and no guard is added.

    checked: of an earlier stage; nodes that nothing has happened to since are not run again
    """
    checked = {} if checked is None else checked
    try:
        gm.graph.lint()
    except Exception as error:
        raise VerifyError(f"normfx: after stage '{stage}' the graph is malformed: {error}") from error
    copied = carried(gm.graph)
    mode = _single_mode(gm, stage)
    with replayed_modes(gm.graph) as nodes:
        for node in nodes:
            if node in copied or node.op in ("output", "call_module"):
                continue
            _check_target(node, stage)
            _check_value(gm, node, stage)
            if isinstance(node.target, OpOverload) and not is_foreign_op(node) and mode is not None:
                depends = _dependences(node)
                if not _all_the_same(checked.get(node), depends):
                    _check_rerun(node, mode, stage)
                    checked[node] = depends


def _dependences(node: Node) -> tuple[Any, ...]:
    """What the outcome of running a node again depends on, as objects: they are compared by identity."""
    values = pytree.tree_map_only(Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
    leaves, structure = pytree.tree_flatten((values, node.meta.get("val")))
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (node.target, str(structure), str(autocast), *leaves)


def _all_the_same(old: tuple[Any, ...] | None, new: tuple[Any, ...]) -> bool:
    if old is None or len(old) != len(new) or old[1:3] != new[1:3]:
        return False
    return all(a is b for a, b in zip(old[3:], new[3:], strict=True)) and old[0] is new[0]


def _fail(stage: str, node: Node, expected: object, found: object) -> VerifyError:
    return VerifyError(
        f"normfx: after stage '{stage}', node '{node.name}' ({node.target}): expected {expected}, found {found}"
    )


def _single_mode(gm: GraphModule, stage: str) -> FakeTensorMode | None:
    mode: FakeTensorMode | None = None
    for node in gm.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, FakeTensor):
                mode = mode or leaf.fake_mode
                if leaf.fake_mode is not mode:
                    raise _fail(stage, node, "one fake mode in the whole graph", "a value of another one")
    return mode


def _check_target(node: Node, stage: str) -> None:
    if acts_on_autograd(node):
        return
    if node.op == "call_method":
        raise _fail(stage, node, "an ATen op", f"the method '{node.target}'")
    if node.op != "call_function" or is_mode_switch(node):
        return
    target = node.target
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        return
    home, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if home in _SCALAR_MODULES or name.startswith(("sym_", "_sym_")):
        return
    raise _fail(stage, node, "an op overload, a higher-order op, getitem or scalar arithmetic", target)


def _check_value(gm: GraphModule, node: Node, stage: str) -> None:
    if "val" in node.meta:
        return
    target = node.target
    if node.op == "get_attr":
        makes_value = isinstance(attribute(gm, str(target)), torch.Tensor)
    elif node.op == "placeholder":
        makes_value = bool(node.users)
    else:
        makes_value = isinstance(target, OpOverload) and bool(schema(target).returns)
    if makes_value:
        raise _fail(stage, node, "meta['val']", "none")


def _check_rerun(node: Node, mode: FakeTensorMode, stage: str) -> None:
    data_dependent = torch.Tag.data_dependent_output in node.target.tags  # type: ignore[union-attr]
    if data_dependent or node.target is torch.ops.aten.item.default or node.meta.get("unbacked_bindings"):
        return  # a new symbol on every run, or none without the value
    try:
        again = run_again(node, mode)
    except Exception as error:
        raise _fail(stage, node, "an op that accepts its arguments", f"{type(error).__name__}: {error}") from error
    recorded = pytree.tree_leaves(node.meta.get("val"))
    for old, new in zip(recorded, pytree.tree_leaves(again), strict=False):
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
            continue
        if old.dtype != new.dtype or old.device != new.device or not _same_shape(old, new):
            raise _fail(stage, node, _describe(new), _describe(old))
        orders = memory_order(old), memory_order(new)
        if orders[0] != orders[1] and None not in orders and op_name(node) not in _STORED_BY_MODE:
            raise _fail(stage, node, f"dimensions in memory in the order {orders[1]}", orders[0])
    given = operands(node)
    if shared(again, given) and not shared(recorded, given):
        raise _fail(stage, node, "a view of its operand", "a value that shares no memory with it")


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(_same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _same_size(a: Any, b: Any) -> bool:
    """Equality that adds no guard; two sizes that cannot be told apart count as equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    difference = _expression(a) - _expression(b)
    env: Any = next(x.node.shape_env for x in (a, b) if isinstance(x, torch.SymInt))
    value = env.replace(difference).xreplace(dict(_hints(env)))
    return value == 0 or not value.is_number


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _hints(env: Any) -> Iterator[tuple[Any, Any]]:
    # torch 2.13 calls the table `var_to_val`, torch 2.15 `backed_var_to_val`
    table = getattr(env, "backed_var_to_val", None)
    yield from (env.var_to_val if table is None else table).items()


def _describe(value: torch.Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"
