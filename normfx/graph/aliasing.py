"""Which values of a canonical graph share storage, and what is written in place.

An in-place write is a barrier: a consumer may not move a read of the value across it. `mutated` names those that
capture/functionalize.py leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.compat import pytree
from normfx.compat.operators import HigherOrderOperator, OpOverload, base_name, schema
from normfx.compat.tensors import storage_key
from normfx.graph.effects import WRITES_STATISTICS, unannotated_writes
from normfx.graph.opaque import CARRIED, is_foreign_op, is_plain_value, only_wraps
from normfx.graph.regions import acts_on_autograd, attribute, carried, is_opaque, target_name

Storage = int

RANDOM_TWINS = frozenset({"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"})
"""Random ops whose out-of-place form draws the same numbers in the same order."""

_VIEWS = frozenset(
    [
        "view",
        "view_as",
        "reshape",
        "transpose",
        "swapaxes",
        "movedim",
        "permute",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "flatten",
        "unflatten",
        "contiguous",
        "to",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "t",
        "T",
        "mT",
        "getitem",
        "detach",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "select",
        "alias",
    ]
)


def mutated(graph: Graph) -> frozenset[Node]:
    """Every node whose storage is written in place after the node, through the node or any alias of it.

    The result of an in-place op is in the set only if a later op writes again.
    """
    writes = list(_writes(graph))
    if not writes:
        return frozenset()
    storages = storages_of(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    last_write: dict[Storage, int] = {}
    for node, targets in writes:
        for target in targets:
            for storage in storages.get(target, ()):
                last_write[storage] = position[node]
    return frozenset(
        node for node, held in storages.items() if any(last_write.get(s, -1) > position[node] for s in held)
    )


# ---------------------------------------------------------------- storages


def storages_of(graph: Graph) -> dict[Node, frozenset[Storage]]:
    """The storages a node's value lives in.

    Fakes share storage where the tensors they stand for do (torch 2.13 and 2.15, but for eval `dropout` on
    2.13), so storage identity covers views, `getitem` and in-place results. Carried nodes and operators from outside
    torch have made-up fakes: one that may hand out an input shares that input's storages, one without a fake shares its
    inputs'. A tensor of a subclass counts as a storage of its own.
    """
    found: dict[Node, frozenset[Storage]] = {}
    copied = carried(graph)
    for node in graph.nodes:
        own = frozenset(_identities(node.meta.get("val")))
        if node in copied and (not own or _may_return_input(graph, node)):
            own = own.union(*(found.get(n, frozenset()) for n in node.all_input_nodes))
        elif not own or target_name(node) == "getitem" or is_foreign_op(node):
            own = own.union(*(found.get(n, frozenset()) for n in _aliased_by_schema(node)))
        elif is_identity_dropout(node):
            own |= found[node.args[0]]
        found[node] = own
    return found


def escaping(graph: Graph, storages: dict[Node, frozenset[Storage]]) -> frozenset[Storage]:
    """Storages that may leave the graph, be written, or be kept by something we know nothing of."""
    return frozenset(s for node in graph.nodes if _lets_out(node) for n in node.all_input_nodes for s in storages[n])


def may_leave(node: Node, storages: dict[Node, frozenset[Storage]]) -> bool:
    """Whether the graph returns, writes or reads through another value memory that it has, or would have with other
    strides, or hands it to something other than an ATen op."""
    seen, work = {node}, [node]
    while work:
        item = work.pop()
        for user in item.users:
            if target_name(user) != "getitem" and not acts_on_autograd(user) and not _stays_inside(user):
                return True
            shares = storages[user] & storages[item] or item in _aliased_by_schema(user)
            if shares and user not in seen:
                seen.add(user)
                work.append(user)
    return False


def _stays_inside(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    return not schema(target).is_mutable and not schema(target).name.startswith("aten::as_strided")


def read_outside(graph: Graph, inside: frozenset[Node], storages: dict[Node, frozenset[Storage]]) -> Iterator[Node]:
    """The values inside that nodes outside read, each once; for a view, what it is a view of."""
    found: set[Node] = set()
    for node in graph.nodes:
        work = [] if node in inside else [n for n in node.all_input_nodes if n in inside]
        while work:
            item = work.pop()
            if any(storages[item] & storages[n] for n in item.all_input_nodes):
                work += [n for n in item.all_input_nodes if n in inside]
            elif item not in found:
                found.add(item)
                yield item


def _lets_out(node: Node) -> bool:
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return schema(node.target).is_mutable
    return target_name(node) != "getitem" and node.op not in ("placeholder", "get_attr")


def is_identity_dropout(node: Node) -> bool:
    """Dropout that returns its input itself in eager; the fakes of torch 2.13 do not show it."""
    if not isinstance(node.target, OpOverload) or len(node.args) < 3 or not isinstance(node.args[0], Node):
        return False
    name = base_name(node.target)
    return name in RANDOM_TWINS and (node.args[2] is False or node.args[1] in (0, 0.0))


def _identities(value: Any) -> Iterator[Storage]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and not is_plain_value(leaf):
            yield id(leaf)
        elif isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            yield storage_key(leaf.untyped_storage())


def _aliased_by_schema(node: Node) -> list[Node]:
    """Inputs a node without a value may alias, from the alias annotations of its schema."""
    if target_name(node) == "getitem":
        return [n for n in node.args[:1] if isinstance(n, Node)]
    if not isinstance(node.target, OpOverload):
        return []
    return [n for argument, n in _bound(node) if argument.alias_info is not None]


def _bound(node: Node) -> Iterator[tuple[Any, Node]]:
    """(schema argument, node) for each node among the arguments of an op, lists included."""
    arguments = schema(node.target).arguments
    by_name = {a.name: a for a in arguments}
    pairs = [*zip(arguments, node.args, strict=False), *((by_name[k], v) for k, v in node.kwargs.items())]
    for argument, value in pairs:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Node):
                yield argument, leaf


def operands_by_name(node: Node) -> list[tuple[str, Node]]:
    """The nodes among the arguments of an op, those in lists too, each with the name of its schema argument."""
    return [(argument.name, operand) for argument, operand in _bound(node)]


# ---------------------------------------------------------------- writes


def _writes(graph: Graph) -> Iterator[tuple[Node, list[Node]]]:
    """(node, values it writes in place) for every node that writes."""
    copied = carried(graph)
    region = [n for n in copied if not isinstance(n.target, HigherOrderOperator)]
    region_writes = any(_looks_in_place(n) for n in region)
    for node in graph.nodes:
        if statistics := unannotated_writes(node):
            yield node, statistics
        elif isinstance(node.target, OpOverload) and schema(node.target).is_mutable:
            yield node, [n for a, n in _bound(node) if a.alias_info is not None and a.alias_info.is_write]
        elif node in copied:
            unknown = node.op == "call_module" or (is_opaque(node) and not only_wraps(node))
            higher = isinstance(node.target, HigherOrderOperator)
            if _subgraph_writes(graph, node) if higher else unknown or region_writes:
                yield node, node.all_input_nodes
        elif node.op == "call_method" and acts_on_autograd(node):
            yield node, node.all_input_nodes


def _looks_in_place(node: Node) -> bool:
    """Whether an untraced node may write to its arguments, by its name: `add_`, `iadd`, `setitem`, `out=`."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return bool(schema(node.target).is_mutable)
    name = target_name(node)
    operator_form = (
        getattr(node.target, "__module__", None) == "_operator" and name[0] == "i" and name[1:] in _OPERATORS
    )
    method = name.endswith("_") and not name.endswith("__")
    return method or operator_form or name in {"setitem", *WRITES_STATISTICS} or "out" in node.kwargs


_OPERATORS = frozenset(
    ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"]
)


def _subgraphs(graph: Graph, node: Node) -> Iterator[Graph]:
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and graph.owning_module is not None:
            value = attribute(graph.owning_module, str(operand.target))
            if isinstance(value, GraphModule):
                yield value.graph


def _subgraph_writes(graph: Graph, node: Node) -> bool:
    if target_name(node) == "triton_kernel_wrapper_mutation":
        return True
    return any(
        _looks_in_place(inner) or (inner in carried(sub) and _subgraph_writes(sub, inner))
        for sub in _subgraphs(graph, node)
        for inner in sub.nodes
    )


def _may_return_input(graph: Graph, node: Node) -> bool:
    """Whether a carried node may hand out one of its inputs, or a view of one."""
    if not isinstance(node.target, HigherOrderOperator) and (is_opaque(node) or CARRIED in node.meta):
        return True
    for sub in _subgraphs(graph, node):
        for value in sub.output_node().all_input_nodes:
            while value.op != "placeholder" and target_name(value) in _VIEWS and value.all_input_nodes:
                value = value.all_input_nodes[0]
            if value.op == "placeholder":
                return True
    return False
