"""Norms that read the sum of two activations: residual adds, with the number that scales one of them (DeepNorm) and the
norm before the add (sandwich norms)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

from torch.fx import Node

from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entry_readers, occurrences, op_name, tensor, value
from normfx.graph.recompute import region_of
from normfx.ir.sites import Norm, Residual, Scaled
from normfx.recognize.readers import number_factor
from normfx.recognize.rows import same_shape

_ADDS = {"aten::add.Tensor": 1.0, "aten::sub.Tensor": -1.0}
_Argument: TypeAlias = Literal["self", "other"]
_ROLES: tuple[tuple[_Argument, _Argument], ...] = (("other", "self"), ("self", "other"))
"""Which argument of an add is the residual, and which is x."""


def find_residuals(facts: Facts, norms: Iterable[Norm], scaled: Iterable[Scaled]) -> Iterator[Residual]:
    """One for each sum, of the first norm that reads it. Values of parameters alone are no residuals."""
    ordered = sorted(norms, key=lambda norm: norm.output)
    outputs = {norm.output: norm for norm in ordered} | {found.node: found.norm for found in scaled}
    fused: set[Norm] = set()
    seen: set[Node] = set()
    for norm in ordered:
        add = norm.input
        if op_name(add) not in _ADDS or add in seen or norm.kind not in ("LayerNorm", "RMSNorm"):
            continue
        terms = {name: arguments(add)[name] for name in ("self", "other")}
        if any(value(term) is None or _is_constant(term, facts) for term in terms.values()):
            continue
        seen.add(add)
        found = _residual(norm, add, terms, {n: o for n, o in outputs.items() if o not in fused}, facts)
        if not found.obstacle:
            fused.update(found.norms)
        yield found


def _is_constant(term: Node, facts: Facts) -> bool:
    """Whether parameters alone decide a term. Looked-up rows are rows nevertheless, at known positions too."""
    return term in facts.parameters and op_name(term) != "aten::embedding"


def _residual(norm: Norm, add: Node, terms: Mapping[str, Node], outputs: Mapping[Node, Norm], facts: Facts) -> Residual:
    alpha = arguments(add)["alpha"]
    code, detail = _obstacle(norm, add, terms, facts)
    if code or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return Residual(norm, add, "other", 1.0, obstacle=code or "broadcast", detail=detail)
    alpha = alpha * _ADDS[op_name(add)]
    roles = [pair for pair in (_ROLES if alpha == 1.0 else _ROLES[:1]) if _alike(terms[pair[1]], add)]
    if not roles:  # x, whose factor is 1, has the dtype of the sum; the residual may be narrower
        return Residual(norm, add, "other", 1.0, obstacle="broadcast", detail=add.name)
    inner = {n: outputs[t] for n, t in terms.items() if t in outputs and _feeds(outputs[t], t, add, facts)}
    scaled = {n: t for n, t in terms.items() if _scales(t, add, facts)}
    argument, x = max(roles, key=lambda pair: 2 * (pair[1] in inner) + (pair[0] in scaled))
    return Residual(norm, add, argument, alpha, scaled.get(argument), inner.get(x))


def _obstacle(norm: Norm, add: Node, terms: Mapping[str, Node], facts: Facts) -> tuple[str, str]:
    if norm.obstacle:
        return "opaque_norm", norm.obstacle
    if norm.axis is None:
        return "several_axes", f"dimensions {norm.dims} of {add.name}"
    written = [node for node in (add, *terms.values()) if node in facts.written]
    if written:
        return "mutated", ", ".join(node.name for node in written)
    odd = [t for t in terms.values() if not _fits(t, add)]
    if odd:
        return "broadcast", ", ".join(node.name for node in odd)
    if facts.modes[add] != facts.modes[norm.output]:
        return "gradient_mode", add.name
    if region_of(add) != region_of(norm.output):
        return "checkpointed", add.name
    early = [user for user in _other_readers(norm, add) if user < norm.output]
    vectors = [v for v in (norm.weight, norm.bias) if v is not None]
    late = early and not all(facts.order.can_lift(v, min(early)) for v in vectors)
    if late or (early and not _same_place(min(early), add, facts)):
        return "read_before", ", ".join(user.name for user in early)
    return "", ""


def _same_place(node: Node, other: Node, facts: Facts) -> bool:
    """Whether both run in one gradient mode, and are recomputed together if at all."""
    return facts.modes[node] == facts.modes[other] and region_of(node) == region_of(other)


def _alike(node: Node, other: Node) -> bool:
    """Equal shape, dtype and device."""
    return _fits(node, other) and tensor(node).dtype == tensor(other).dtype


def _fits(node: Node, other: Node) -> bool:
    """Equal shape and device, without a guard on symbolic sizes; both floating."""
    a, b = tensor(node), tensor(other)
    floats = a.is_floating_point() and b.is_floating_point()
    return floats and a.device == b.device and same_shape(tuple(a.shape), tuple(b.shape))


def _other_readers(norm: Norm, add: Node) -> list[Node]:
    """Readers of the sum, or of its shape, that stay when the norm has become one op."""
    inside = {n for n in norm.nodes if n is norm.output or all(user in norm.nodes for user in n.users)}
    return [user for user in add.users if user not in inside]


def _feeds(inner: Norm, output: Node, add: Node, facts: Facts) -> bool:
    """Whether this norm and the add can be one op."""
    plain = not inner.obstacle and inner.axis is not None
    return (
        plain
        and inner.kind in ("LayerNorm", "RMSNorm")
        and _alone(output, add)
        and output not in facts.written
        and inner.input not in facts.written
        and _same_place(output, add, facts)
        and _alike(inner.input, add)
    )


def _scales(product: Node, add: Node, facts: Facts) -> bool:
    """Whether a term is a value times a number, for the add alone."""
    source = next((n for n in product.all_input_nodes if value(n) is not None), None)
    if source is None or number_factor(product, source) is None or not _alone(product, add):
        return False
    same = _same_place(product, add, facts) and _alike(source, product)
    return same and product not in facts.written and source not in facts.written


def _alone(node: Node, add: Node) -> bool:
    return entry_readers(node) == [add] and occurrences(add, node) == 1
