"""With dynamic=True Dynamo makes float attributes of user modules symbolic: also the eps of a hand-written norm.

Which norm it is depends on the number, so Dynamo is asked to start over with that float as a guarded constant, in the
way in which its own backends ask. Other floats stay symbolic.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from normfx.compat.dynamo import TensorifyScalarRestartAnalysis, TensorifyState, symbol_of
from normfx.graph.regions import target_name

_JOINS = frozenset({"add", "iadd", "radd", "__add__", "__radd__", "clamp", "clamp_min", "maximum", "max"})
_ROOTS = frozenset({"rsqrt", "sqrt", "pow", "rpow", "ipow", "truediv", "div", "reciprocal"})


def specialize_epsilons(gm: GraphModule) -> None:
    """Restart Dynamo's analysis, by its own exception, if a norm's epsilon is a symbolic float in this graph.

    Returns when there is none, or when each of them was asked for before. The caller must let the exception pass.
    """
    fresh = [name for name in _epsilon_symbols(gm) if not TensorifyState.should_specialize(name)]
    for name in fresh:
        TensorifyState.specialize(name)
    if fresh:
        raise TensorifyScalarRestartAnalysis


def _epsilon_symbols(gm: GraphModule) -> Iterator[str]:
    """Names of the symbols of float inputs that are read as epsilons, and nowhere as tensors."""
    for node in gm.graph.find_nodes(op="placeholder"):
        item = getattr(node.meta.get("example_value"), "item_memo", None)
        name = symbol_of(item)
        if name is None or not node.users or any(user.target != "item" for user in node.users):
            continue
        if any(_is_epsilon(reader) for user in node.users for reader in user.users):
            yield name


def _is_epsilon(reader: Node) -> bool:
    """sqrt(v + ε), max(v, ε)**-0.5, x/(s + ε), or an argument of a function that is a norm by name."""
    name = target_name(reader)
    if name in _JOINS:
        return any(target_name(user) in _ROOTS for user in reader.users)
    return name.endswith("_norm") or name in ("normalize", "var", "std")
