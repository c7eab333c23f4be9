"""What a rewrite must leave as it is where tensors are spread over processes: how each of them is laid out.

An op on DTensors chooses the layout of its result by those of its operands. With a weight laid out in another way a
process would take another part out of the same whole. So after a rewrite each such op is run again on fakes, and what
was there before must be laid out as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normfx.compat import pytree
from normfx.compat.distributed import is_distributed
from normfx.compat.operators import OpOverload
from normfx.errors import NormfxError
from normfx.graph.names import source_line
from normfx.graph.shards import crossing, own_part


@dataclass(frozen=True)
class Laid:
    """The layout of a node's value (None: it is no DTensor) and of its operands, and its arguments."""

    layout: Any
    operands: tuple[Any, ...]
    arguments: Any


Layouts = Mapping[Node, Laid]


def layouts(graph: Graph) -> Layouts:
    """How the DTensors of a graph are laid out, for each node that reads or makes one."""
    found = {}
    for node in graph.nodes:
        laid = Laid(_layout(_value(node)), _operands(node, {}), (node.args, node.kwargs))
        if laid.layout is not None or any(operand is not None for operand in laid.operands):
            found[node] = laid
    return found


def check_layouts(graph: Graph, before: Layouts) -> None:
    """Raise NormfxError where a DTensor that a graph had before is laid out in another way now, or where a call that is
    not known reads one that is.

    Only what a rewrite has touched is run again: some layouts remember what was looked up, and allow it once.
    """
    if not before:
        return
    now: dict[Node, Any] = {}  # values of what is new, or may have changed
    for node in graph.nodes:
        old, value = before.get(node), _value(node)
        fed = any(operand in now for operand in node.all_input_nodes)
        fed = fed or (old is not None and old.arguments != (node.args, node.kwargs))
        runs = fed and _may_run(node)
        if runs:
            value = _run(node, now)
        if is_distributed(value) and (runs or old is None):
            now[node] = value
        same = old is None or (_layout(value) == old.layout and (runs or _operands(node, now) == old.operands))
        if not same:
            where = source_line(node) or node.name
            raise NormfxError(f"normfx: the rewrite would change how the DTensors at {where} are laid out")


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _layout(value: Any) -> Any:
    return (value.device_mesh, tuple(value.placements), tuple(value.shape)) if is_distributed(value) else None


def _operands(node: Node, now: Mapping[Node, Any]) -> tuple[Any, ...]:
    return tuple(_layout(now.get(operand, _value(operand))) for operand in node.all_input_nodes)


def _may_run(node: Node) -> bool:
    """Whether a call is torch's own: an operator, or one that lays a DTensor out. What makes one says how itself."""
    return isinstance(node.target, OpOverload) or crossing(node) in ("redistribute", "to_local")


def _run(node: Node, now: Mapping[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: now.get(n, _value(n)))
    tensors = [own_part(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with tensors[0].fake_mode, torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)
