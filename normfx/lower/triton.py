"""Which norms of a rewritten graph run on a generated kernel, and why the others do not."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from normfx.ir import ops
from normfx.ir.aliasing import mutated
from normfx.ir.graph import arguments, entries, grad_modes, op_name, shape, value
from normfx.ir.ops import Form as Canonical
from normfx.ir.recompute import region_of
from normfx.kernels.cost import backward_cost, forward_cost
from normfx.kernels.launch import backward_launch, forward_launch
from normfx.kernels.source import Source, backward_source, forward_source
from normfx.kernels.spec import DTYPES, Spec
from normfx.lower.choice import objection
from normfx.lower.norm_ops import NORM, Form

_FLOATS = {getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Lowered:
    """of: what each canonical norm runs on, "triton: " and a name, or "inductor: " and why; kernels: sources by name"""

    of: Mapping[Node | None, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)


def has_kernels(fake: torch.Tensor) -> bool:
    """Whether there are kernels for a tensor's device and dtype."""
    return fake.device.type == "cuda" and fake.dtype in _FLOATS


def lower_norms(gm: GraphModule, everywhere: bool) -> Lowered:
    """Let canonical norms run as `normfx::norm`, in place, together with the residual add they read.

    everywhere: wherever there is a kernel, not only where it is predicted to be ahead of Inductor
    """
    graph = gm.graph
    written, modes = mutated(graph), grad_modes(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    kernels: dict[str, str] = {}
    found: dict[Node | None, str] = {}
    for node in [n for n in graph.nodes if n.target in (ops.RMS_NORM, ops.LAYER_NORM, ops.CRMS_NORM)]:
        why = _objection(node)
        if why:
            if everywhere:
                found[node] = f"inductor: {why}"
            continue
        added = _residual(node, order)
        if added is not None and (added in written or _apart(added, node, modes)):
            added = None
        spec = _spec(node, added)
        why = "" if everywhere else objection(spec, node, added, modes[node], order)
        if why:
            found[node] = f"inductor: {why}"
            continue
        new = _replace(gm, node, added)
        order.update(dict.fromkeys((new, *new.users), order[node if added is None else added]))
        rows = entries(shape(node)[:-1])
        found[node] = f"triton: {spec.name}, {_bytes(spec, rows, modes[node])}"
        for source in _sources(spec, modes[node]):
            kernels[source.name] = source.text
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return Lowered(found, kernels)


def _apart(add: Node, norm: Node, modes: Mapping[Node, bool]) -> bool:
    """Whether an add and its norm cannot be one op: in one gradient mode only, or not recomputed together."""
    return modes[add] != modes[norm] or region_of(add) != region_of(norm)


def _sources(spec: Spec, trains: bool) -> list[Source]:
    found = [forward_source(spec, forward_launch(spec), True)]
    if trains:
        found.append(backward_source(spec, backward_launch(spec), spec.sum is not None))
    return found


def _bytes(spec: Spec, rows: sympy.Expr, trains: bool) -> str:
    """What the kernels must move, forward and backward, the partial sums of dγ and dβ left out."""
    forward = sympy.simplify(forward_cost(spec, rows, statistics=True).bytes)
    if not trains:
        return f"{forward} bytes"
    backward = sympy.simplify(backward_cost(spec, rows, spec.sum is not None, sympy.Integer(0)).bytes)
    return f"{forward} bytes forward, {backward} backward"


def _form(node: Node) -> Canonical:
    given: tuple[Any, ...] = node.args[3:]
    return Canonical(*given)


def _objection(node: Node) -> str:
    """Why there is no kernel for a canonical norm; "" when there is one."""
    x, weight, bias = (value(a) for a in node.args[:3])
    form = _form(node)
    assert x is not None
    if not has_kernels(x):
        return f"there are no kernels for {x.dtype} on {x.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    width = x.shape[-1] if x.ndim else 0
    if form.dim % max(x.ndim, 1) != x.ndim - 1 or not isinstance(width, int):
        return "it does not run over the last dimension, of a fixed size"
    if form.eps_place != "inside":
        return "ε is added to the root"
    if form.compute_dtype not in (torch.float32, x.dtype) or not _has_kernel(x, form.out_dtype):
        return f"it is computed in {form.compute_dtype} and returned as {form.out_dtype}"
    for vector in (weight, bias):
        if vector is not None and (tuple(vector.shape) != (width,) or not _has_kernel(x, vector.dtype)):
            return f"its weight or bias is {vector.dtype} of shape {list(vector.shape)}"
    return ""


def _has_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return dtype in _FLOATS or dtype == x.dtype


def _residual(node: Node, order: Mapping[Node, int]) -> Node | None:
    """The add whose result this norm reads, where both can be one op at the place of the add."""
    add = node.args[0]
    if not isinstance(add, Node) or op_name(add) != "aten::add.Tensor":
        return None
    given = arguments(add)
    terms = [value(given["self"]), value(given["other"])]
    total = value(add)
    same = all(t is not None and total is not None and (t.shape, t.dtype) == (total.shape, total.dtype) for t in terms)
    if not same or not isinstance(given["alpha"], int | float):
        return None
    vectors = [a for a in node.args[1:3] if isinstance(a, Node)]
    return add if all(order.get(v, len(order)) < order[add] for v in vectors) else None


def _operands(node: Node, added: Node | None) -> tuple[tuple[Any, ...], Form]:
    """x, residual, γ, β, and the other arguments of the op."""
    x, weight, bias = node.args[:3]
    canonical, residual, alpha = _form(node), None, 1.0
    if added is not None:
        given = arguments(added)
        x, residual, alpha = given["self"], given["other"], float(given["alpha"])
    kind = (node.target is ops.LAYER_NORM, node.target is ops.CRMS_NORM)
    form = Form(*kind, canonical.eps, canonical.scale, canonical.correction, alpha, canonical.out_dtype)
    return (x, residual, weight, bias), form


def _spec(node: Node, added: Node | None) -> Spec:
    """What the kernel of a norm computes. float64, which has none, is shown as float32: only in tests, where the op
    runs as ATen."""
    operands, form = _operands(node, added)
    shown = {torch.float64: torch.float32}
    x, *others = (
        None if t is None else torch.empty_like(t, dtype=shown.get(t.dtype, t.dtype), device="meta")
        for t in map(value, operands)
    )
    assert x is not None
    return form._replace(out_dtype=shown.get(form.out_dtype, form.out_dtype)).spec(x, *others)


def _replace(gm: GraphModule, node: Node, add: Node | None) -> Node:
    """Write the op; `add` is computed by it."""
    operands, form = _operands(node, add)
    with gm.graph.inserting_before(add or node):
        new = _call(gm, node, NORM, (*operands, *form))
        out = _call(gm, node, operator.getitem, (new, 0))
        total = _call(gm, add, operator.getitem, (new, len(new.meta["val"]) - 1)) if add is not None else None
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    if add is not None and total is not None:
        add.replace_all_uses_with(total)
        gm.graph.erase_node(add)
    return new


def _call(gm: GraphModule, like: Node, target: Any, args: tuple[Any, ...]) -> Node:
    new = gm.graph.call_function(target, args)
    new.meta = {k: v for k, v in like.meta.items() if k != "val"}
    fakes: Any = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with like.meta["val"].fake_mode:
        new.meta["val"] = target(*fakes)
    return new
