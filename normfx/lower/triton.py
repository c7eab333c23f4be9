"""Which norms of a rewritten graph run on a generated kernel, and why the others do not."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from normfx.capture.cleanup import drop_dead_code
from normfx.compat.distributed import is_distributed
from normfx.graph.aliasing import mutated
from normfx.graph.calls import add_call
from normfx.graph.nodes import entries, grad_modes, shape, tensor, total, value
from normfx.graph.views import settle
from normfx.ir.fused_ops import CALLS, KINDS, NORM_ADD_NORM, NormCall, norm_call
from normfx.kernels.cost import backward_cost, forward_cost
from normfx.kernels.launch import BACKWARD_IN_REGISTERS, backward_launch, forward_launch
from normfx.kernels.source import Source, backward_source, forward_source
from normfx.kernels.spec import DTYPES, Spec
from normfx.lower.choice import objection
from normfx.lower.norm_ops import NORM, kernel_spec
from normfx.lower.two_norms import TWO_NORMS
from normfx.lower.writer_bias import WriterBiases, Written, without_bias

_FLOATS = {getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Lowered:
    """of: what each canonical norm runs on, "triton: " and a name, or "inductor: " and why; kernels: sources by name"""

    of: Mapping[Node | None, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)


def has_kernels(fake: torch.Tensor) -> bool:
    """Whether there are kernels for a tensor's device and dtype."""
    return fake.device.type == "cuda" and fake.dtype in _FLOATS


def lower_norms(gm: GraphModule, everywhere: bool, trained: Container[Node]) -> Lowered:
    """Let canonical norms run as `normfx::norm` or `normfx::two_norms`, in place.

    everywhere: wherever there is a kernel, not only where it is predicted to be ahead of Inductor
    trained:    the parameters that want a gradient
    """
    graph = gm.graph
    modes = grad_modes(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    biases = WriterBiases(modes, mutated(graph), trained)
    kernels: dict[str, str] = {}
    found: dict[Node | None, str] = {}
    for node in [n for n in graph.nodes if n.target in CALLS]:
        call = norm_call(node)
        why = _objection(node, call)
        if why:
            if everywhere:
                found[node] = f"inductor: {why}"
            continue
        keeps_sum = modes[node] or _is_sum_read(node)
        writer = _writer(call, biases)
        spec = _spec(call, keeps_sum, writer)
        why = "" if everywhere else objection(spec, node, modes[node], order)
        if why:
            found[node] = f"inductor: {why}"
            continue
        new = _replace(gm, node, call, modes[node], keeps_sum, writer)
        order.update(dict.fromkeys((new, *new.users), order[node]))
        rows = entries(shape(call.x)[:-1])
        found[node] = f"triton: {spec.name}, {_bytes(spec, rows, modes[node])}"
        for source in _sources(spec, modes[node]):
            kernels[source.name] = source.text
    drop_dead_code(gm.graph)
    settle(gm)
    return Lowered(found, kernels)


def _sources(spec: Spec, trains: bool) -> list[Source]:
    found = [forward_source(spec, forward_launch(spec), trains)]
    if trains:
        parts = (spec,) if spec.inner is None else (spec.last, spec.first)
        found += [backward_source(part, backward_launch(part), part.sum is not None) for part in parts]
    return found


def _bytes(spec: Spec, rows: sympy.Expr, trains: bool) -> str:
    """What the kernels must move, forward and backward, the partial sums of dγ and dβ left out."""
    forward = sympy.simplify(forward_cost(spec, rows, statistics=trains).bytes)
    if not trains:
        return f"{forward} bytes"
    parts = (spec,) if spec.inner is None else (spec.last, spec.first)
    backward = total(backward_cost(part, rows, part.sum is not None, sympy.Integer(0)).bytes for part in parts)
    return f"{forward} bytes forward, {sympy.simplify(backward)} backward"


def _objection(node: Node, call: NormCall) -> str:
    """Why there is no kernel for a canonical norm; "" when there is one."""
    x = tensor(call.x)
    if is_distributed(x):
        return "its input is a DTensor"
    if not has_kernels(x):
        return f"there are no kernels for {x.dtype} on {x.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    width = x.shape[-1] if x.ndim else 0
    for form in call.forms:
        if form.dim % max(x.ndim, 1) != x.ndim - 1 or not isinstance(width, int):
            return "it does not run over the last dimension, of a fixed size"
        if form.eps_place != "inside":
            return "ε is added to the root" if form.eps_place == "outside" else "ε is a lower bound"
        if form.compute_dtype not in (torch.float32, x.dtype) or not _has_kernel(x, form.out_dtype):
            return f"it is computed in {form.compute_dtype} and returned as {form.out_dtype}"
    for vector in (value(v) for v in call.vectors):
        if vector is not None and (tuple(vector.shape) != (width,) or not _has_kernel(x, vector.dtype)):
            return f"its weight or bias is {vector.dtype} of shape {list(vector.shape)}"
    if (call.inner or any(form.centre_output for form in call.forms)) and width > BACKWARD_IN_REGISTERS:
        return f"a row of {width} does not fit into registers, as it must to be centred or normalised twice"
    if call.inner and (call.inner.form.out_dtype != x.dtype or any(form.compressed for form in call.forms)):
        return "the norm before the add changes the dtype, or rows are compressed"
    return ""


def _has_kernel(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return dtype in _FLOATS or dtype == x.dtype


def _writer(call: NormCall, biases: WriterBiases) -> Written | None:
    """The linear layer whose bias the kernel of an add and norm adds, so that backward sums its gradient with the
    others: that of either operand that is not scaled, where programs of backward keep sums over rows."""
    if call.residual is None or call.inner is not None or call.form.compressed or call.x is call.residual:
        return None
    for operand in (call.x, *([call.residual] if call.alpha == 1.0 else [])):
        found = biases.of(operand)
        if found is not None and _has_kernel(tensor(call.x), tensor(found.bias).dtype):
            return found if backward_launch(_spec(call, True, found)).persistent else None
    return None


def _tensors(call: NormCall, writer: Written | None) -> tuple[Node | None, ...]:
    """The tensors of the op, with what a writer writes as it is."""
    x_bias = () if call.inner else (writer.bias if writer else None,)
    return (call.x, call.residual, *call.vectors, *x_bias)


def _spec(call: NormCall, keeps_sum: bool, writer: Written | None) -> Spec:
    """What the kernel of a norm computes. float64, which has none, is shown as float32: only in tests, where the op
    runs as ATen. keeps_sum: the sum of an add is stored; writer: of x or the residual, its bias in the kernel."""
    shown = {torch.float64: torch.float32}
    x, residual, *vectors = (
        None if t is None else torch.empty_like(t, dtype=shown.get(t.dtype, t.dtype), device="meta")
        for t in map(value, _tensors(call, writer))
    )
    assert x is not None
    forms = [form._replace(out_dtype=shown.get(form.out_dtype, form.out_dtype)) for form in call.forms]
    if call.inner:
        inner_weight, inner_bias, weight, bias = vectors
        inner = (forms[0], inner_weight, inner_bias)
        return kernel_spec(x, residual, weight, bias, forms[-1], call.alpha, keeps_sum, inner)
    weight, bias, x_bias = vectors
    return kernel_spec(x, residual, weight, bias, forms[-1], call.alpha, keeps_sum, x_bias=x_bias)


def _is_sum_read(node: Node) -> bool:
    """Whether anything reads the sum of a norm with an add. Two norms in one kernel always store it."""
    if node.target in KINDS:
        return False
    return node.target is NORM_ADD_NORM or any(part.args[1] == 1 and part.users for part in node.users)


def _replace(
    gm: GraphModule, node: Node, call: NormCall, trains: bool, keeps_sum: bool, writer: Written | None
) -> Node:
    """Write the op; parts of its result replace those of the canonical one. trains: its statistics are kept."""
    forms = [field for form in call.forms for field in form]
    tensors = _tensors(call, writer)
    if writer is not None:
        unbiased = without_bias(writer)
        tensors = tuple(unbiased if operand is writer.value else operand for operand in tensors)
    with gm.graph.inserting_before(node):
        if call.inner is None:
            new = add_call(gm.graph, NORM, (*tensors, *forms, call.alpha, trains, keeps_sum), node)
        else:
            new = add_call(gm.graph, TWO_NORMS, (*tensors, *forms, call.alpha, trains), node)
        place = 1 if call.inner else len(new.meta["val"]) - 1  # of the sum
        kept = (0, place) if keeps_sum else (0,)
        parts = [add_call(gm.graph, operator.getitem, (new, i), node) for i in kept]
    if node.target in KINDS:
        node.replace_all_uses_with(parts[0])
    for old in list(node.users):
        index: Any = old.args[1]
        if old.users:
            old.replace_all_uses_with(parts[index])
        gm.graph.erase_node(old)
    gm.graph.erase_node(node)
    return new
