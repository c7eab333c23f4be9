"""Sums in which the output of one linear stands several times: it stands there once afterwards.

    y + s ⊙ (y − c) + z  ==  p ⊙ y + q + z        p = 1 + s,  q = −s ⊙ c,  s and c of parameters alone

A layer that trains the magnitude of each output feature (DoRA) is written in the first form, where y is read by a
product and keeps its mean. In the second one p ⊙ y is a linear with a factor for each output feature, which may be
centred (maths M11). So is s ⊙ (y − c) + c (BOFT) by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from normfx.graph.affine import composed
from normfx.graph.calls import add_call
from normfx.graph.facts import Facts, facts_of
from normfx.graph.nodes import arguments, op_name, tensor, value
from normfx.graph.recompute import region_of
from normfx.graph.views import settle
from normfx.ir.affine import Step
from normfx.ir.sites import Axis
from normfx.recognize.flow import CONVOLUTIONS, LINEARS, RESHAPES
from normfx.recognize.scalings import link_of

WIDE = (torch.float32, torch.float64)
"""Half precision rounds after each op, and would round other values in the other form."""

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """An operand of a sum, as steps from a base. inner: what stands between, the operand included; along: the axes of
    the vectors."""

    node: Node
    base: Node
    steps: tuple[Step, ...]
    inner: tuple[Node, ...]
    along: frozenset[Axis]


def gather_multiples(gm: GraphModule, weights: frozenset[Node]) -> int:
    """Writes such sums in the second form, in place. Returns the number of outputs that were gathered."""
    bases = {node for node in gm.graph.nodes if _is_product(node)}
    if not bases:
        return 0
    facts = facts_of(gm.graph, weights)
    seen: set[Node] = set()
    count = 0
    for node in reversed(list(gm.graph.nodes)):
        if node in seen or not _adds(node, facts):
            continue
        sums, operands = _sum(node, facts)
        seen |= sums
        terms = [term for operand in operands if (term := _term(operand, node, bases, facts)) is not None]
        for base in dict.fromkeys(term.base for term in terms):
            same = [term for term in terms if term.base is base]
            if (len(same) > 1 or _shifts_first(same[0])) and _is_all(base, same, sums):
                _gather(gm.graph, same, sums)
                count += 1
    if count:
        settle(gm)
    return count


def _is_product(node: Node) -> bool:
    """Whether a value is the output of a linear or convolution, or a view of it."""
    while op_name(node) in RESHAPES:
        node = arguments(node)["self"]
    return op_name(node) in LINEARS | CONVOLUTIONS


def _adds(node: Node, facts: Facts) -> bool:
    """Whether a node adds two values of its own shape and dtype."""
    if op_name(node) != "aten::add.Tensor" or node in facts.written or node in facts.parameters:
        return False
    args = arguments(node)
    own, operands = tensor(node), (value(args["self"]), value(args["other"]))
    same = all(fake is not None and (fake.shape, fake.dtype) == (own.shape, own.dtype) for fake in operands)
    return same and args["alpha"] == 1 and own.dtype in WIDE and args["self"] is not args["other"]


def _sum(root: Node, facts: Facts) -> tuple[set[Node], list[Node]]:
    """The additions that lead to a sum, which nothing else reads, and what they add."""
    sums, operands, work = {root}, [], list(root.all_input_nodes)
    while work:
        node = work.pop()
        if _adds(node, facts) and len(node.users) == 1 and _together(node, root, facts):
            sums.add(node)
            work += node.all_input_nodes
        else:
            operands.append(node)
    return sums, operands


def _together(node: Node, other: Node, facts: Facts) -> bool:
    """Whether two nodes are computed in one mode, in one checkpointed region or none."""
    return facts.modes[node] == facts.modes[other] and region_of(node) == region_of(other)


def _term(node: Node, root: Node, bases: Iterable[Node], facts: Facts) -> _Term | None:
    """The operand of a sum as a scaled and shifted base, in the dtype of the sum; None where it is none."""
    end, inner = node, []
    steps: tuple[Step, ...] = ()
    along: frozenset[Axis] = frozenset()
    while node not in bases:
        found = link_of(node, facts)
        if found is None or len(node.users) != 1 or node in facts.written or not _together(node, root, facts):
            return None
        if tensor(node).dtype != tensor(root).dtype:
            return None
        inner.append(node)
        node, axis, before = found
        along |= frozenset() if axis is None else {axis}
        steps = (*before, *steps)
    fits = node not in facts.written and _together(node, root, facts) and tensor(node).dtype == tensor(root).dtype
    return _Term(end, node, steps, tuple(inner), along) if fits else None


def _shifts_first(term: _Term) -> bool:
    """Whether something is added to the base before a factor is applied."""
    ops = [step.op for step in term.steps]
    return "add" in ops and any(op != "add" for op in ops[ops.index("add") :])


def _is_all(base: Node, terms: list[_Term], sums: set[Node]) -> bool:
    """Whether a base stands in these terms, and nowhere but there, with vectors along one axis."""
    inside = {node for term in terms for node in term.inner}
    plain = [user for user in base.users if user in sums]
    alone = all(user in sums or user in inside for user in base.users)
    along = {axis for term in terms for axis in term.along}
    return len(plain) < 2 and alone and len(along) == 1


def _gather(graph: Graph, terms: list[_Term], sums: set[Node]) -> None:
    """The last of the terms becomes p ⊙ base + q, and the others go."""
    *others, last = sorted(terms, key=lambda term: term.node)
    gammas: list[Node | float] = []
    betas: list[Node | float] = []
    with graph.inserting_before(last.node):
        for term in terms:
            gamma, beta = composed(graph, term.steps, last.node)
            gammas.append(1.0 if gamma is None else gamma)
            betas += [] if beta is None else [beta]
        total = add_call(graph, aten.mul.Tensor, (terms[0].base, _total(graph, gammas, last.node)), last.node)
        if betas:
            total = add_call(graph, aten.add.Tensor, (total, _total(graph, betas, last.node)), last.node)
    last.node.replace_all_uses_with(total)
    for term in others:
        (parent,) = (user for user in term.node.users if user in sums)
        (rest,) = (operand for operand in parent.all_input_nodes if operand is not term.node)
        parent.replace_all_uses_with(rest)
        sums.remove(parent)
        graph.erase_node(parent)


def _total(graph: Graph, parts: list[Node | float], like: Node) -> Node:
    """The sum of some vectors and of the number of those that are 1."""
    vectors = [part for part in parts if isinstance(part, Node)]
    total = vectors[0]
    for vector in vectors[1:]:
        total = add_call(graph, aten.add.Tensor, (total, vector), like)
    ones = float(len(parts) - len(vectors))
    return add_call(graph, aten.add.Tensor, (total, ones), like) if ones else total
