"""Norms written out in single ops, found by computing with them (algebra.py), not by templates.

For a value x and one of its axes, every node that depends on x and parameters alone becomes an expression. A
node is a norm when its expression reads

    γ·(x − M)·(k·(S − M²) + e)^(−1/2) + β        LayerNorm
    γ·x·(k·S + e)^(−1/2) + β                     RMSNorm

with M = mean(x), S = mean(x²), parameters γ and β along the axis or absent; formula.py has the other places
of the epsilon. All steps are identities: a look-alike has another expression, a new spelling needs no code.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from normfx.graph.barriers import regions
from normfx.graph.nodes import arguments, is_one, op_name, value
from normfx.ir import ops
from normfx.recognize import algebra
from normfx.recognize.algebra import M, S, X
from normfx.recognize.formula import Formula, read
from normfx.recognize.row_ops import HANDLERS
from normfx.recognize.rows import (
    CASTS,
    COPIES,
    MEANS,
    REDUCTIONS,
    Rows,
    operands,
    readers,
    reduced_dims,
    widens,
)

SUBTRACTIONS = frozenset({"aten::sub.Tensor", "aten::subtract.Tensor"})
SQUARES = frozenset({"aten::pow.Tensor_Scalar", "aten::square", "aten::mul.Tensor", "aten::multiply.Tensor"})


@dataclass(frozen=True)
class Spelled:
    """A norm written in single ops; `core` is its first node that is a norm, before casts and affine."""

    formula: Formula
    input: Node
    core: Node
    output: Node
    nodes: frozenset[Node]
    dim: int
    size: int
    compute_dtype: torch.dtype
    obstacle: str


@dataclass(frozen=True)
class Order:
    """Graph order, and what must not be crossed."""

    nodes: tuple[Node, ...]
    position: Mapping[Node, int]
    region: Mapping[Node, Hashable]
    blocked: frozenset[Node]


def order_of(graph: Graph, blocked: frozenset[Node]) -> Order:
    nodes = tuple(graph.nodes)
    return Order(nodes, {node: k for k, node in enumerate(nodes)}, regions(graph), blocked)


def find_spelled(order: Order, parameters: frozenset[Node]) -> Iterator[Spelled]:
    """All spelled-out norms that contain no blocked node, each output once."""
    tried: set[tuple[Node, int, Hashable]] = set()
    outputs: set[Node] = set()
    for seed in order.nodes:
        for x, dim in sorted(_candidates(seed, parameters), key=lambda c: order.position[c[0]]):
            attempt = (x, dim, order.region[seed])
            if x in order.blocked or attempt in tried:
                continue
            tried.add(attempt)
            rows = Rows(x, dim, parameters, HANDLERS)
            expand(rows, x, order, order.region[seed])
            for norm in _norms(rows):
                if norm.output not in outputs:
                    outputs.add(norm.output)
                    yield norm


def _candidates(seed: Node, parameters: frozenset[Node]) -> set[tuple[Node, int]]:
    """Values whose statistics the reduction `seed` may take, with the axis."""
    if op_name(seed) not in REDUCTIONS or seed in parameters:
        return set()
    dims = reduced_dims(seed)
    operand = arguments(seed)["self"]
    val = value(operand)
    if val is None or not val.dtype.is_floating_point or len(dims) != 1 or (dims == (0,) and val.ndim > 1):
        return set()  # several dimensions, or statistics over the batch
    if is_one(val.shape[dims[0]]):
        return set()  # x/|x| of single entries
    found: set[Node] = set()
    todo: list[object] = [operand]
    while todo:
        node = todo.pop()
        source = value(node)
        if not isinstance(node, Node) or node in found or node in parameters:
            continue
        if source is None or source.ndim != val.ndim or not source.dtype.is_floating_point:
            continue
        found.add(node)
        name = op_name(node)
        squares = name in SQUARES and node.args[-1] in (node.args[0], 2)
        if squares or name in CASTS or name in COPIES or name in SUBTRACTIONS:
            todo.append(node.args[0])
    return {(node, dims[0]) for node in found}


def expand(rows: Rows, start: Node, order: Order, region: Hashable) -> None:
    """Give expressions to everything downstream of a node that has one, in graph order, as far as there are any."""
    queue = [order.position[user] for user in start.users]
    heapq.heapify(queue)
    last = -1
    while queue:
        place = heapq.heappop(queue)
        if place == last:
            continue
        last, node = place, order.nodes[place]
        if order.region[node] == region and node not in order.blocked and rows.visit(node):
            for user in node.users:
                heapq.heappush(queue, order.position[user])


def _norms(rows: Rows) -> Iterator[Spelled]:
    """Norms among the expressions: from the first node that is one to the last that still is."""
    formulas: dict[Node, Formula] = {}
    cores: list[Node] = []
    after: set[Node] = set()
    for node in rows.forms:
        poly = rows.poly(node)
        formula = read(poly, rows.size) if poly is not None and rows.is_full(node) else None
        if formula is not None:
            formulas[node] = formula
        if after.intersection(operands(node)):
            after.add(node)
        elif formula is not None:
            after.add(node)
            cores.append(node)
    for core in cores:
        yield _spelled(rows, core, _last(core, formulas), formulas)


def _last(core: Node, formulas: Mapping[Node, Formula]) -> Node:
    """The last node that is the same norm with more affine; a widening cast is no end."""
    before = end = core
    for node in only_readers(core, formulas):
        widened = _dtype(before) != _dtype(node) and widens(_dtype(before), _dtype(node))
        if not widened or op_name(node) not in CASTS:
            end = node
        before = node
    return end


def only_readers(node: Node, among: Container[Node]) -> Iterator[Node]:
    """The only reader of a value, the only reader of that, and so on, as long as they are among these nodes."""
    while len(users := readers(node)) == 1 and users[0] in among:
        (node,) = users
        yield node


def _dtype(node: Node) -> torch.dtype:
    val = value(node)
    assert val is not None
    return val.dtype


def _spelled(rows: Rows, core: Node, output: Node, formulas: Mapping[Node, Formula]) -> Spelled:
    source, nodes = _extent(rows, output)
    return Spelled(
        formula=formulas[output],
        input=source,
        core=core,
        output=output,
        nodes=nodes,
        dim=rows.dim,
        size=rows.size,
        compute_dtype=_compute_dtype(rows, nodes),
        obstacle=_escape(rows, output, nodes),
    )


def _extent(rows: Rows, output: Node) -> tuple[Node, frozenset[Node]]:
    """Input and nodes of a norm. Casts of x that others read too are before the norm, not in it."""
    nodes = {output}
    todo = [output]
    while todo:
        for operand in operands(todo.pop()):
            if operand in rows.forms and operand is not rows.x and operand not in nodes:
                nodes.add(operand)
                todo.append(operand)
    copies = {node for node in nodes if rows.poly(node) == algebra.atom(X)}
    shared = {copy for copy in copies if any(user not in nodes for user in readers(copy))}
    shared |= {operand for copy in shared for operand in operands(copy) if operand in copies}
    entries = {operand for node in nodes - copies for operand in operands(node) if operand in copies | {rows.x}}
    if len(entries) == 1 and entries <= shared:
        return entries.pop(), frozenset(nodes - copies)
    return rows.x, frozenset(nodes - shared)


def _compute_dtype(rows: Rows, nodes: frozenset[Node]) -> torch.dtype:
    """dtype in which the norm's squares are summed: a mean of squares has that of its squares, and ops that square
    themselves (var, norm) are wide inside."""
    for node in rows.forms:
        if node in nodes and op_name(node) in REDUCTIONS:
            form = rows.forms[node]
            if isinstance(form, tuple) and all(user.args[1] != 0 for user in node.users if user in nodes):
                continue  # var_mean for its mean alone
            first = form[0] if isinstance(form, tuple) else form
            if not algebra.proportional(first.poly, M) and first.poly.number is None:
                val = node.meta["val"]
                dtype: torch.dtype = (val[0] if isinstance(form, tuple) else val).dtype
                return dtype if op_name(node) in MEANS else ops.accumulation_dtype(dtype)
    raise AssertionError("a norm has a mean of squares")


def _escape(rows: Rows, output: Node, nodes: frozenset[Node]) -> str:
    """Why the norm cannot be replaced as a whole: somebody reads what is inside it."""
    for node in rows.forms:
        if node not in nodes or node is output or isinstance(rows.forms[node], tuple):
            continue
        for user in readers(node):
            if user not in nodes:
                return f"{_role(rows, node)} inside the norm ({node}) is also read by {user}"
    return ""


def _role(rows: Rows, node: Node) -> str:
    poly = rows.poly(node)
    if poly is None:
        return "a value"
    if algebra.proportional(poly, M):
        return "the mean"
    if poly == algebra.add(algebra.atom(X), algebra.atom(M), -1):
        return "the centred value"
    if poly.per_row:
        return "the variance" if algebra.statistic(poly) or S in poly else "the reciprocal deviation"
    return "a row-sized intermediate"
