"""In-place writes to values that no other code can see become out-of-place, so that `x += f(x)` is no barrier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from normfx.compat import pytree
from normfx.compat.operators import OpOverload, base_name, has_kernel, overload, schema
from normfx.compat.tensors import FakeTensor
from normfx.compat.tracing import enable_python_dispatcher
from normfx.graph.aliasing import RANDOM_TWINS, Storage, storages_of
from normfx.graph.regions import carried, replayed_modes, target_name
from normfx.graph.views import settle


def functionalize_local(gm: GraphModule) -> int:
    """Turn in-place ops on fresh local values into their out-of-place form; returns how many were turned.

    Left alone: values that share storage with an input, a tensor attribute or a carried node; values with an
    older alias that is read later; ops that change a value's strides, shape or dtype in ways its out-of-place
    form would not; writes without grad to a value made with grad, which keep the value's gradient where the
    out-of-place form has none.
    """
    storages, position = storages_of(gm.graph), {node: i for i, node in enumerate(gm.graph.nodes)}
    copied = carried(gm.graph)
    grad_on: dict[Node, bool] = {}
    count = 0
    with replayed_modes(gm.graph) as nodes:
        for node in nodes:
            grad_on[node] = torch.is_grad_enabled()
            functional = _functional(node)
            if functional is None or node in copied or not isinstance(node.args[0], Node):
                continue
            older = _older_aliases(node, storages, position)
            if not _is_local(node, older, copied, position, grad_on):
                continue
            result = _evaluate(node, functional)
            if result is None:
                continue
            for new in _replace(gm, node, functional, result, position):
                position[new], storages[new], grad_on[new] = position[node], storages[node], grad_on[node]
            del position[node], storages[node]
            count += 1
    if count:
        settle(gm)
    return count


def _functional(node: Node) -> OpOverload | None:
    """`aten::add.Tensor` for `aten::add_.Tensor`; None for every other op and where autograd knows no such
    form.
    """
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload) or op.namespace != "aten":
        return None
    name = base_name(op)
    if not name.endswith("_") or name.endswith("__") or torch.Tag.inplace_view in op.tags:
        return None
    if name == "copy_":  # torch 2.13 and 2.15 have no derivative for `aten::copy`
        return None
    if torch.Tag.nondeterministic_seeded in op.tags and name[:-1] not in RANDOM_TWINS:
        return None
    twin = overload(getattr(torch.ops.aten, name[:-1], None), op)
    if not isinstance(twin, OpOverload) or not _same_signature(op, twin, node.kwargs):
        return None
    return twin if has_kernel(twin, "CompositeImplicitAutograd", "Autograd") else None


def _same_signature(op: OpOverload, twin: OpOverload, kwargs: Iterable[str]) -> bool:
    mine, other = schema(op).arguments, schema(twin).arguments
    writes = [a.name for a in mine if a.alias_info is not None and a.alias_info.is_write]
    types = [str(a.type) for a in mine] == [str(a.type) for a in other]
    names = {a.name for a in mine} & {a.name for a in other}
    return types and names >= set(kwargs) and writes == [mine[0].name] and not schema(twin).is_mutable


def _older_aliases(node: Node, storages: dict[Node, frozenset[Storage]], position: dict[Node, int]) -> list[Node]:
    """Values made before `node` that share storage with what it writes, the written value included."""
    held = storages[node.args[0]]  # type: ignore[index]
    return [n for n, s in storages.items() if s & held and position[n] < position[node]]


def _is_local(
    node: Node, older: Iterable[Node], copied: set[Node], position: dict[Node, int], grad_on: dict[Node, bool]
) -> bool:
    target, here = node.args[0], position[node]
    for alias in older:
        made_here = isinstance(alias.target, OpOverload) or target_name(alias) == "getitem"
        if alias.op != "call_function" or alias in copied or not made_here:
            return False
        if alias is not target and any(position[user] > here for user in alias.users):
            return False
        if not grad_on[node] and grad_on[alias]:
            return False
    return bool(list(older))


def _evaluate(node: Node, functional: OpOverload) -> FakeTensor | None:
    """Value of the out-of-place form; None where it is not what the in-place op stores, up to a cast."""
    stored = node.meta.get("val")
    if not isinstance(stored, FakeTensor):
        return None
    args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
    device = stored.device.type
    with stored.fake_mode, enable_python_dispatcher(), torch.no_grad():
        result = functional(*args, **kwargs)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                plain = functional(*args, **kwargs)
            if plain.dtype != result.dtype:  # autocast acts on this form and not on the in-place one
                return None
    same = _sizes(result) == _sizes(stored) and result.device == stored.device
    return result if same and _offset(result) == _offset(stored) else None


def _sizes(value: torch.Tensor) -> list[Any]:
    """Sizes and strides as numbers and sympy expressions: comparing them adds no guard."""
    return [_expression(x) for x in (*value.shape, *value.stride())]


def _offset(value: torch.Tensor) -> Any:
    return _expression(value.storage_offset())


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _replace(
    gm: GraphModule, node: Node, functional: OpOverload, result: FakeTensor, position: dict[Node, int]
) -> list[Node]:
    """Put the out-of-place form in the node's place and hand it to every later user of the written value. Returns the
    new nodes: it, and a cast where it promotes.

    The new node keeps the fake of the old one, so that views made of it later still share its storage.
    """
    target, stored = node.args[0], node.meta["val"]
    assert isinstance(target, Node)
    later = [user for user in target.users if position[user] > position[node]]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(functional, node.args, node.kwargs)
        new.meta = dict(node.meta)
        made = [new]
        if result.dtype != stored.dtype:
            new.meta["val"] = result
            new = gm.graph.call_function(torch.ops.aten.to.dtype, (new, stored.dtype))
            new.meta = dict(node.meta)
            made.append(new)
    for user in later:
        user.replace_input_with(target, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return made
