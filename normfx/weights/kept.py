"""Which folded weights of a rewritten graph need not be computed in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from normfx.compat.tensors import FakeTensor
from normfx.graph.aliasing import escaping, read_outside, storages_of
from normfx.graph.nodes import BAKED, grad_modes, parameter_only, value
from normfx.graph.regions import is_autocast
from normfx.ir import ops
from normfx.recognize.composed import is_autocast_neutral
from normfx.weights.expression import Expression, expression
from normfx.weights.native import watches_pages


@dataclass(frozen=True, eq=False)
class Kept:
    """A value of the graph that can be computed before it runs: what computes it, from which inputs or attributes."""

    node: Node
    expression: Expression
    sources: tuple[Node, ...]


def records_gradients(graph: Graph) -> bool:
    """Whether any part of the graph runs with gradients recorded, in the present gradient mode."""
    return torch.is_grad_enabled() or any(grad_modes(graph).values())


def keepable(
    graph: Graph, weights: frozenset[Node], trained: frozenset[Node], everywhere: bool = True
) -> frozenset[Node]:
    """The weights whose folds may be kept: their gradient is not asked for, in the present gradient mode.

    weights:    parameters, buffers and constants; `trained`: those that want a gradient
    everywhere: also where looking at the parameters is slow or not exact: on devices, where it waits for them and looks
                at samples, and on the CPU where the kernel does not tell which pages were written
    """
    wanted = trained if records_gradients(graph) else frozenset()
    plain = frozenset(n for n in weights - wanted if is_plain(n))
    if everywhere:
        return plain
    near = frozenset(n for n in plain if _fake(n).device.type == "cpu")
    return near if near and watches_pages() else frozenset()


def is_plain(node: Node) -> bool:
    """Whether a weight is an ordinary strided tensor: not a subclass, not quantised, not sparse."""
    fake = value(node)
    if fake is None or type(fake) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
        return False
    return fake.layout == torch.strided and not fake.is_quantized


def _fake(node: Node) -> torch.Tensor:
    fake = value(node)
    assert fake is not None
    return fake


def kept_values(graph: Graph, free: frozenset[Node]) -> tuple[Kept, ...]:
    """The largest expressions on the keepable weights `free` that contain a fold or a baked node.

    Views are left in the graph, after the kept value. Nothing is kept that shares memory with what the graph returns
    or writes: it would change under the caller.
    """
    known = parameter_only(graph, free)
    folding = folded(known)
    if not folding:
        return ()
    storages = storages_of(graph)
    outside = escaping(graph, storages)
    autocast = is_autocast(graph)
    leaves = dict.fromkeys(free)
    return tuple(
        Kept(node, *expression(node, leaves))
        for node in read_outside(graph, known, storages)
        if node in folding and not storages[node] & outside and (not autocast or _is_neutral(node, free))
    )


def _is_neutral(node: Node, leaves: frozenset[Node]) -> bool:
    work, seen = [node], set()
    while work:
        item = work.pop()
        if item in seen or item in leaves:
            continue
        seen.add(item)
        if item.target not in ops.FOLDS and not is_autocast_neutral(item):
            return False
        work += item.all_input_nodes
    return True


def folded(known: frozenset[Node]) -> frozenset[Node]:
    """The known nodes that are, or depend on, a fold or a baked node."""
    found: set[Node] = set()
    work = [n for n in known if n.target in ops.FOLDS or BAKED in n.meta]
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work += [u for u in node.users if u in known]
    return frozenset(found)
