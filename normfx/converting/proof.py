"""The proof that a copy computes the same: its graph is the rewritten one, with the new parameters in the places of
folds. A module whose norm was exchanged counts as one op: what it computes was said by the rewritten graph."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from normfx.compat.operators import OpOverload
from normfx.converting.places import Places, Slot
from normfx.errors import ConvertError
from normfx.graph.names import module_path
from normfx.graph.nodes import arguments, op_name, tensor


def prove(rewritten: Places, copied: Places, norms: frozenset[str], ones: frozenset[Slot]) -> None:
    """Raises ConvertError where the two graphs are not the same.

    norms: the paths of modules that were exchanged; ones: parameters of the copy that are ones
    """
    numbers: dict[Any, int] = {}
    if _outputs(rewritten, norms, frozenset(), numbers) != _outputs(copied, norms, ones, numbers):
        raise ConvertError(
            "normfx.convert: the copy's graph is not the rewritten one. Does the model's forward choose what to do by "
            "its weights or the classes of its norms? Else please report it"
        )


def _outputs(places: Places, norms: frozenset[str], ones: frozenset[Slot], numbers: dict[Any, int]) -> str:
    """What a graph returns. Values are numbers: equal ones for equal ops on equal operands."""
    gm, known = places.captured.graph_module, places.known
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if node not in known]
    of = {node: numbers.setdefault(("input", i), len(numbers)) for i, node in enumerate(inputs)}
    entering: dict[Node, frozenset[int]] = {}
    for node in gm.graph.nodes:
        if node in known or node in of or node.op == "output":
            continue
        path, factors = module_path(node), [n for n in node.all_input_nodes if n in places.names]
        if op_name(node) == "aten::mul.Tensor" and len(factors) == 1 and places.slot(factors[0], node) in ones:
            (x,) = (n for n in node.all_input_nodes if n is not factors[0])
            if tensor(x).shape == tensor(node).shape and tensor(x).dtype == tensor(node).dtype:
                of[node] = of[x]
                continue
        if path in norms:
            operands = [n for n in node.all_input_nodes if n not in known]
            inside = [entering[n] if n in entering and module_path(n) == path else {of[n]} for n in operands]
            entering[node] = frozenset().union(*inside)
            key: Any = ("norm", path, tuple(sorted(entering[node])))
        else:
            key = (_target(gm, node), repr(map_arg(_arguments(node), _shown(node, places, of))))
        of[node] = numbers.setdefault(key, len(numbers))
    output = gm.graph.output_node()
    return repr(map_arg(output.args, _shown(output, places, of)))


def _arguments(node: Node) -> Any:
    return arguments(node) if isinstance(node.target, OpOverload) else (node.args, dict(node.kwargs))


class _Value(str):
    """An operand in the text of a call, unlike any string argument."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _shown(user: Node, places: Places, of: dict[Node, int]) -> Any:
    return lambda n: _Value(places.token(n, user) if n in places.known else of[n])


def _target(gm: GraphModule, node: Node) -> str:
    held = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
    return held.code if isinstance(held, GraphModule) else f"{node.op} {node.target}"
