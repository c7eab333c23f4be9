"""Every norm of a canonical graph: whole ops and spelled-out ones, as ir.sites.Norm."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from normfx.graph.aliasing import mutated
from normfx.graph.nodes import arguments, op_name, value
from normfx.graph.shards import has_whole_rows, is_summed
from normfx.ir.sites import Norm, NormKind
from normfx.recognize.affine import with_affine
from normfx.recognize.formula import Formula
from normfx.recognize.rows import readers
from normfx.recognize.spelled import Spelled, find_spelled, order_of

Naming = Callable[[Node], str]

LAYER_NORMS = frozenset({"aten::layer_norm", "aten::native_layer_norm"})
RMS_NORMS = frozenset({"aten::rms_norm", "aten::_fused_rms_norm"})
BATCH_NORMS = frozenset({
    "aten::batch_norm", "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit.no_stats", "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit_functional", "aten::_batch_norm_impl_index",
    "aten::_batch_norm_with_update", "aten::_batch_norm_no_update",
})  # fmt: skip
GROUP_NORMS = frozenset({"aten::group_norm", "aten::native_group_norm"})
INSTANCE_NORMS = frozenset({"aten::instance_norm"})


def find_norms(
    graph: Graph,
    parameters: frozenset[Node],
    name: Naming,
    source: Naming,
    blocked: frozenset[Node] | None = None,
    modules: bool = False,
) -> tuple[Norm, ...]:
    """All norms of `graph`, in the order of their output nodes.

    parameters: nodes that depend on parameters, buffers and constants only
    name:       module path of a node, "" when unknown; norms of one module become "path", "path#2", …
    source:     source line of a node, "" when unknown
    blocked:    values whose memory is written in place (found here when not given)
    modules:    norms will be modules of torch.nn: ops after a norm are no part of it, and no such module has a lower
                bound as its ε

    Norms that no rule may touch (their inside is read elsewhere, their affine is computed from data, they
    normalise over the batch) are listed with an obstacle. What is not exactly a norm is not listed.

    >>> class Model(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    >>> graph = torch.export.export(Model(), (torch.randn(3, 8),), strict=False).graph_module.graph
    >>> [(n.kind, n.eps, n.dims) for n in find_norms(graph, frozenset(), lambda n: "", lambda n: "")]
    [('RMSNorm', 1e-06, (1,))]
    """
    position = {node: k for k, node in enumerate(graph.nodes)}
    blocked = mutated(graph) if blocked is None else blocked
    order = order_of(graph, blocked)
    whole = (_whole(node, parameters, blocked, name, source) for node in graph.nodes)
    norms = [norm if modules else with_affine(norm, order, parameters) for norm in whole if norm is not None]
    norms += [_from_spelled(found, name, source) for found in find_spelled(order, parameters)]
    if modules:
        bound = "its eps is a lower bound"
        norms = [replace(n, obstacle=n.obstacle or bound) if n.eps_place == "clamped" else n for n in norms]
    norms.sort(key=lambda norm: position[norm.output])
    return tuple(_named(norms))


def _named(norms: list[Norm]) -> Iterator[Norm]:
    """Make names unique and give one to every nameless norm."""
    seen: Counter[str] = Counter()
    for norm in norms:
        base = norm.name or {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}.get(norm.kind, norm.kind.lower())
        count = seen[base]
        seen[base] += 1
        suffix = f"#{count + 1}" if norm.name else f"_{count}"
        yield replace(norm, name=base + suffix if count else base)


def _from_spelled(found: Spelled, name: Naming, source: Naming) -> Norm:
    formula = found.formula
    return Norm(
        name=name(found.core),
        kind=formula.kind,
        source=source(found.core),
        input=found.input,
        output=found.output,
        nodes=found.nodes,
        dims=(found.dim,),
        size=found.size,
        eps=formula.eps,
        eps_place=formula.eps_place,
        correction=formula.correction,
        weight=formula.weight,
        bias=formula.bias,
        compute_dtype=found.compute_dtype,
        out_dtype=found.output.meta["val"].dtype,
        obstacle=found.obstacle or _vanishing_bound(formula, found.compute_dtype),
    )


def _vanishing_bound(formula: Formula, dtype: torch.dtype) -> str:
    """‖x‖ ≥ ε bounds x² by ε², which may be 0 in the dtype of the squares: then rows of zeros would become 0/0."""
    lost = formula.eps_place == "clamped" and formula.eps < torch.finfo(dtype).tiny
    return f"the square of its eps, a lower bound, is below the normal numbers of {dtype}" if lost else ""


@dataclass(frozen=True)
class _Op:
    """What a whole op says about itself."""

    kind: NormKind
    dims: tuple[int, ...]
    size: int
    eps: float | None
    obstacle: str


def _whole(
    node: Node, parameters: frozenset[Node], blocked: frozenset[Node], name: Naming, source: Naming
) -> Norm | None:
    op = op_name(node)
    if not op.startswith("aten::") or "norm" not in op:
        return None
    call = arguments(node)
    output = _first_result(node)
    read = _describe(op, call) if output is not None else None
    if read is None or output is None:
        return None
    val, out = value(call["input"]), value(output)
    assert val is not None and out is not None
    dtype = torch.float32 if val.dtype in (torch.float16, torch.bfloat16) else val.dtype
    weight, bias = call.get("weight"), call.get("bias")
    nodes = frozenset({node, output})
    obstacles = (
        read.obstacle,
        _other_results(node, output),
        _from_data(weight, "weight", parameters),
        _from_data(bias, "bias", parameters),
        _in_place(call["input"], output, blocked),
        _spread(call["input"], read.dims),
    )
    return Norm(
        name=name(node),
        kind=read.kind,
        source=source(node),
        input=call["input"],
        output=output,
        nodes=nodes,
        dims=read.dims,
        size=read.size,
        eps=torch.finfo(dtype).eps if read.eps is None else read.eps,
        eps_place="inside",
        correction=0,
        weight=weight,
        bias=bias,
        compute_dtype=dtype,
        out_dtype=out.dtype,
        obstacle=next((text for text in obstacles if text), ""),
    )


def _describe(op: str, call: dict[str, Any]) -> _Op | None:
    val = value(call.get("input"))
    if val is None:
        return None
    rank = val.ndim
    if op in LAYER_NORMS or op in RMS_NORMS:
        shape = call["normalized_shape"]
        # rms_norm(eps=None): finfo of the dtype it computes in (CPU 2.13 and 2.15: float32 for half inputs)
        dims = tuple(range(rank - len(shape), rank))
        return _Op("LayerNorm" if op in LAYER_NORMS else "RMSNorm", dims, _product(shape), call.get("eps"), "")
    if op in GROUP_NORMS:
        groups = call["num_groups"] if "num_groups" in call else call["group"]
        return _Op(
            "GroupNorm",
            tuple(range(1, rank)),
            0,
            call["eps"],
            f"it normalises {groups} groups of channels, each with all positions",
        )
    if op in INSTANCE_NORMS:
        return _Op(
            "InstanceNorm",
            tuple(range(2, rank)),
            0,
            call["eps"],
            "it normalises each channel over positions, not over features",
        )
    if op in BATCH_NORMS:
        batch = tuple(k for k in range(rank) if k != 1)
        return _Op("BatchNorm", batch, 0, call.get("eps", call.get("epsilon")), _batch_obstacle(op, call))
    return None


def _batch_obstacle(op: str, call: dict[str, Any]) -> str:
    if takes_batch_statistics(op, call):
        return "it takes its statistics over the batch, not over the features"
    return "with running statistics it is an affine map of each channel, not a normalisation of its input"


def takes_batch_statistics(op: str, call: dict[str, Any]) -> bool:
    """Whether a call of a BatchNorm normalises by the statistics of its input, whatever module or mode it is in."""
    live = call.get("training", "no_training" not in op and "no_update" not in op)
    return live is not False or call.get("running_mean") is None or call.get("running_var") is None


def _product(sizes: list[object]) -> int:
    result = 1
    for size in sizes:
        if not isinstance(size, int):
            return 0
        result *= size
    return result


def _first_result(node: Node) -> Node | None:
    """The node of the normalised value: `node` itself, or getitem 0 of an op with several results."""
    if value(node) is not None:
        return node
    items = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    return items[0] if len(items) == 1 else None


def _other_results(node: Node, output: Node) -> str:
    for user in node.users:
        if node is not output and user is not output and readers(user):
            return f"its statistics ({user}) are also read by {readers(user)[0]}"
    return ""


def _from_data(node: object, what: str, parameters: frozenset[Node]) -> str:
    if isinstance(node, Node) and node not in parameters:
        return f"its {what} ({node}) is computed from data"
    return ""


def _spread(source: Node, dims: tuple[int, ...]) -> str:
    whole = all(has_whole_rows(value(source), dim) for dim in dims) and not is_summed(value(source))
    return "" if whole else f"no process holds whole rows of its input ({source})"


def _in_place(source: Node, output: Node, blocked: frozenset[Node]) -> str:
    for what, node in (("input", source), ("output", output)):
        if node in blocked:
            return f"its {what} ({node}) is written in place"
    return ""
