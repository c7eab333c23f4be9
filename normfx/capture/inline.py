"""Regions of a Dynamo graph that are nothing but calls of their bodies, written out where they are called.

torch.utils.checkpoint and torch.compiler.nested_compile_region become one node each, with a graph of its own, and a
residual stream that runs through such a node is out of sight. Checkpointing is a hint to AOTAutograd's partitioner
about each single node (recompute.py), so the body can stand in the graph itself, with the hints that torch would give
its nodes. What is compiled then computes the same, in the same order, and draws the same random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from normfx.compat.operators import HigherOrderOperator
from normfx.graph.nodes import grad_modes, is_getitem
from normfx.graph.opaque import touches_subclass
from normfx.graph.recompute import FIRST_REGION, keep, mark, region_of
from normfx.graph.regions import attribute, is_opaque, is_traceable, target_name

CHECKPOINT, NESTED, WRAP = "tag_activation_checkpoint", "invoke_subgraph", "wrap"

OPERANDS = {CHECKPOINT: 1, NESTED: 2, WRAP: 1}
"""Names of higher-order ops that are written out, and where their operands begin: before them stand the body, and the
name under which a nested region is compiled."""

STAY_ONE_NODE = frozenset(
    {
        "associative_scan",
        "cond",
        "flex_attention",
        "invoke_subgraph",
        "map_impl",
        "scan",
        "triton_kernel_wrapper_functional",
        "triton_kernel_wrapper_mutation",
        "while_loop",
    }
)
"""Higher-order ops that AOTAutograd leaves whole, with the marks of their node. Others dissolve into nodes without
marks: what a custom autograd function saves would be kept instead of computed again."""

NORM_PARTS = frozenset({"mean", "var", "std", "var_mean", "std_mean", "normalize"})
"""Calls that tell of a norm, besides everything whose name ends in `norm`."""

_CALLS = ("call_function", "call_method", "call_module")


def inline_regions(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph with checkpointed and nested regions written out; `gm` itself where there are none.

    Each call gets its own copy of the body, with its own arguments; a region inside a checkpoint is part of that.
    Left as they are: selective checkpoints (`context_fn` decides node by node while AOTAutograd runs), checkpoints
    around what would lose its marks, nested regions without a norm or with settings of their own, and what cannot be
    traced.
    """
    modes = grad_modes(gm.graph)
    if not any(_body(gm, node, modes[node]) for node in gm.graph.nodes):
        return gm
    copy = _Copy(gm)
    result = copy.run(gm, {}, modes, None)
    copy.graph.output(result).meta.update(gm.graph.output_node().meta)
    _keep_before_checkpoints(copy.graph)
    for node in copy.graph.find_nodes(op="get_attr"):
        if not node.users:
            copy.graph.erase_node(node)
    inlined = GraphModule(copy.attributes, copy.graph)
    inlined.meta.update(gm.meta)
    inlined.graph.lint()
    return inlined


class _Copy:
    """A graph in the making, and the attributes it reads."""

    def __init__(self, gm: GraphModule) -> None:
        self.graph = Graph()
        self.attributes: dict[str, Any] = {}
        self.regions = count(FIRST_REGION)
        for node in gm.graph.nodes:  # first, so that they keep the names by which Dynamo knows parameters
            if node.op in ("get_attr", "call_module"):
                self._home(gm, node)

    def run(self, gm: GraphModule, values: dict[Node, Any], modes: Mapping[Node, bool], region: int | None) -> Any:
        """Append the nodes of one graph, and return what its output has become.

        values: what its placeholders are; those that are not named are copied
        region: the number of the checkpointed region around it
        """
        for node in gm.graph.nodes:
            body = _body(gm, node, modes[node])
            if node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            if body is not None:
                values[node] = self._call(body, node, values, modes[node], region)
            elif is_getitem(node) and isinstance(values[node.args[0]], tuple):  # a result of a region
                values[node] = values[node.args[0]][node.args[1]]
            elif node not in values:
                values[node] = self._append(gm, node, values, region)
        raise AssertionError("a graph without an output")

    def _call(self, body: GraphModule, node: Node, values: Mapping[Node, Any], grad: bool, region: int | None) -> Any:
        if region is None and target_name(node) == CHECKPOINT and grad:
            region = next(self.regions)
        operands = map_arg(node.args[OPERANDS[target_name(node)] :], values.__getitem__)
        inputs = body.graph.find_nodes(op="placeholder")
        result = self.run(body, dict(zip(inputs, operands, strict=True)), grad_modes(body.graph, grad), region)
        return tuple(result) if isinstance(result, (list, tuple)) else result

    def _append(self, gm: GraphModule, node: Node, values: Mapping[Node, Any], region: int | None) -> Node:
        new = self.graph.node_copy(node, values.__getitem__)
        if node.op in ("get_attr", "call_module"):
            new.target = self._home(gm, node)
        if region is not None and node.op in _CALLS:
            mark(new, region)
        return new

    def _home(self, gm: GraphModule, node: Node) -> str:
        """The name of an attribute in the new graph: one for each thing."""
        thing = attribute(gm, str(node.target))
        wanted = str(node.target).replace(".", "_")
        names = (wanted if i == 0 else f"{wanted}_{i}" for i in count())
        return next(name for name in names if self.attributes.setdefault(name, thing) is thing)


def _body(gm: GraphModule, node: Node, grad: bool) -> GraphModule | None:
    """The body of a region that may be written out, None for any other node. grad: whether gradients are recorded."""
    name = target_name(node)
    if not isinstance(node.target, HigherOrderOperator) or name not in OPERANDS or not isinstance(node.args[0], Node):
        return None
    body = attribute(gm, str(node.args[0].target)) if node.args[0].op == "get_attr" else None
    if not isinstance(body, GraphModule) or any(isinstance(arg, Node) for arg in node.kwargs.values()):
        return None
    whole = len(body.graph.find_nodes(op="placeholder")) == len(node.args) - OPERANDS[name]
    if not whole or not all(is_traceable(inner) for inner in body.graph.nodes):
        return None
    if name == CHECKPOINT:
        return body if "_checkpoint_context_fn" not in body.meta and (not grad or _keeps_marks(body)) else None
    if name == NESTED:
        settings = body.meta.get("nested_region_config") or node.meta.get("custom", {}).get("nested_region_config")
        return body if not settings and _has_norm(body) else None
    return body


def _keeps_marks(body: GraphModule) -> bool:
    """Whether all of a body can carry the marks of a checkpointed region."""
    for node in body.graph.nodes:
        inner = _body(body, node, True)
        higher = isinstance(node.target, HigherOrderOperator) and target_name(node) not in STAY_ONE_NODE
        opaque = node.op == "call_module" or is_opaque(node) or touches_subclass(node)
        if opaque or (not _keeps_marks(inner) if inner is not None else higher):
            return False
    return True


def _has_norm(body: GraphModule) -> bool:
    """Whether a body, or a body inside it, may hold a norm. A region without one has nothing to gain."""
    graphs = [module.graph for module in body.modules() if isinstance(module, GraphModule)]
    names = {target_name(node) for graph in graphs for node in graph.nodes if node.op in _CALLS}
    return not names.isdisjoint(NORM_PARTS) or any(name.endswith("norm") for name in names)


def _keep_before_checkpoints(graph: Graph) -> None:
    """What a region hands to a checkpoint that stays whole is kept.

    Torch numbers that one itself, below ours, so that the partitioner does not know it for the later one.
    """
    for node in graph.nodes:
        if target_name(node) != CHECKPOINT:
            continue
        for operand in node.all_input_nodes:
            if region_of(operand) is not None and region_of(operand) != region_of(node):
                keep(operand)
