"""Small questions about canonical graphs that several rooms ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from normfx.compat import pytree
from normfx.compat.operators import OpOverload, schema
from normfx.graph.aliasing import mutated
from normfx.graph.effects import unannotated_writes
from normfx.graph.regions import modes_along
from normfx.graph.shards import crossing, own_part

SHAPE_READS = frozenset(
    {"aten::sym_size.int", "aten::sym_stride.int", "aten::sym_numel", "aten::_assert_tensor_metadata"}
)
"""Ops that read a value's shape or dtype, never its entries."""

LIKE = frozenset(f"aten::{n}_like" for n in ("zeros", "ones", "full", "empty", "rand", "randn", "randint"))
"""Ops that make a value of the shape of another."""

MADE_LIKE = LIKE | frozenset(f"aten::new_{n}" for n in ("zeros", "ones", "full", "empty", "empty_strided"))
"""Ops that make a value of the shape or dtype of another."""

SHAPED_AS = frozenset({"aten::expand_as", "aten::view_as", "aten::reshape_as"})
"""Ops that take the shape of their second operand."""

BAKED = "normfx_baked"
"""Node meta key: the value, of parameters alone, is to be kept and not computed in every call."""

RANDOM = torch.Tag.nondeterministic_seeded


def op_name(node: Node) -> str:
    """'aten::add.Tensor' for an ATen call ('aten::add' for its default overload), '' for any other node."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return ""
    return str(target.name())  # type: ignore[no-untyped-call]


def value(node: object) -> torch.Tensor | None:
    """The fake tensor a node stands for; None for anything that is not one tensor."""
    if not isinstance(node, Node):
        return None
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def tensor(node: object) -> torch.Tensor:
    """The fake tensor of a node that stands for one."""
    val = value(node)
    assert val is not None, f"{node} is not a tensor"
    return val


def shape(node: Node) -> tuple[int | torch.SymInt, ...]:
    return tuple(tensor(node).shape)


def parameter_only(graph: Graph, parameters: Iterable[Node], written: frozenset[Node] | None = None) -> frozenset[Node]:
    """Nodes that depend on parameters, buffers and constants alone, by deterministic pure ops. Constants are also what
    the graph makes of numbers (zeros, eye): a weight may need them; by themselves they are no such nodes.

    written: values whose memory is written in place after they were made (found here when not given). None of them is
    such a node, nor what reads them: it may read what was written, through whichever alias
    """
    written = mutated(graph) if written is None else written
    known: set[Node] = set(parameters) - written
    made: set[Node] = set()  # of numbers alone
    for node in graph.nodes:
        inputs = node.all_input_nodes
        fixed = node not in written and all(n in known or n in made for n in inputs)
        if fixed and _is_fixed_call(node) and _holds_tensors(node):
            (known if any(n in known for n in inputs) else made).add(node)
    return frozenset(known)


def _is_fixed_call(node: Node) -> bool:
    """Whether a call computes the same from the same operands: a pure one, or what lays out a DTensor that all
    processes hold, or takes a part out of it."""
    return (node.op == "call_function" and is_pure(node)) or crossing(node) in ("redistribute", "to_local")


def is_getitem(node: Node) -> bool:
    """Whether a node picks one result of an op that returns several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def is_pure(node: Node) -> bool:
    """Whether a call always computes the same from the same operands, and does nothing else."""
    target = node.target
    if not isinstance(target, OpOverload):
        return is_getitem(node)
    writes = schema(target).is_mutable or bool(unannotated_writes(node))
    return RANDOM not in target.tags and not writes and not node.is_impure()


def _holds_tensors(node: Node) -> bool:
    val = node.meta.get("val")
    return all(isinstance(v, torch.Tensor) for v in (val if isinstance(val, (list, tuple)) else (val,)))


def grad_modes(graph: Graph, entered: bool | None = None) -> dict[Node, bool]:
    """Whether gradients are recorded at each node of a graph that is entered in this, or the present, gradient mode."""
    mode = torch.is_grad_enabled() if entered is None else entered
    return {node: bool(grad) for node, grad, _ in modes_along(graph, mode)}


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an ATen call by schema name and in its order, defaults filled in."""
    declared = schema(node.target).arguments
    given = {**dict(zip((a.name for a in declared), node.args, strict=False)), **node.kwargs}
    known = [a for a in declared if a.name in given or a.has_default_value()]
    return {a.name: given.get(a.name, a.default_value) for a in known}


def occurrences(node: Node, operand: Node) -> int:
    """How often `operand` stands among the arguments of `node`."""
    found = [a for a in pytree.arg_tree_leaves(*node.args, **node.kwargs) if a is operand]
    return len(found)


def reads_entries(user: Node, node: Node) -> bool:
    """Whether a user of a value reads its entries, not only its shape and dtype."""
    name = op_name(user)
    if name in SHAPED_AS or name in ("aten::type_as", "aten::to.other"):
        return arguments(user)["self"] is node
    return name not in SHAPE_READS and name not in MADE_LIKE


def entry_readers(node: Node) -> list[Node]:
    """Users of a value that read its entries."""
    return [user for user in node.users if reads_entries(user, node)]


def extent(dim: int | torch.SymInt) -> sympy.Expr:
    """A dimension as a sympy expression (never adds a guard)."""
    return dim.node.expr if isinstance(dim, torch.SymInt) else sympy.Integer(dim)


def is_row_major(val: torch.Tensor, cut: int = 0) -> bool:
    """Whether a value is known to be contiguous, or a slice along dimension `cut` of something contiguous (never adds a
    guard)."""
    packed = clamped = sympy.Integer(1)  # torch gives a new tensor strides for sizes of at least 1
    for dim in reversed(range(val.ndim)):
        size, stride = val.shape[dim], val.stride(dim)
        if dim == cut - 1:
            packed = clamped = extent(stride)
        if not is_one(size) and extent(stride) not in (packed, clamped):
            return False
        packed, clamped = packed * extent(size), clamped * extent(torch.sym_max(1, size))
    return True


def memory_order(val: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a value that fills its memory, from the outermost to the innermost in it; None where that is
    not known (never adds a guard)."""
    if val.layout is not torch.strided or val.is_nested:
        return None
    dims = range(val.ndim)
    if any(isinstance(size, int) and size == 0 for size in val.shape):
        return (*dims,)
    orders: list[tuple[int, ...]] = [(*dims,), (*dims[:1], *dims[2:], *dims[1:2])]
    if all(isinstance(stride, int) for stride in val.stride()):
        orders.append(tuple(sorted(dims, key=lambda dim: -int(val.stride()[dim]))))
    return next((order for order in orders if is_row_major(val.permute(order))), None)


def is_one(dim: int | torch.SymInt) -> bool:
    """Whether a dimension is known to be 1 (a symbolic one never is)."""
    return isinstance(dim, int) and dim == 1


def entries(dims: Iterable[int | torch.SymInt]) -> sympy.Expr:
    """Number of entries as a sympy expression, also of no dimensions."""
    return sympy.prod([sympy.Integer(1), *(extent(d) for d in dims)])


def bytes_of(node: Node) -> sympy.Expr:
    """Bytes of a tensor's entries, of a DTensor's in this process, as a sympy expression."""
    return entries(own_part(tensor(node)).shape) * tensor(node).element_size()


def total(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """Their sum as a sympy expression, also of none."""
    return sum(sizes, sympy.Integer(0))


def size_hint(expr: sympy.Expr, nodes: Iterable[Node]) -> int:
    """An expression's value at the sizes seen when the graph was captured; unknown (data-dependent) sizes count 64.

    nodes: tensor nodes whose shapes contain the expression's symbols.
    """
    hints: dict[sympy.Symbol, int] = {}
    for node in nodes:
        for dim in shape(node):
            if isinstance(dim, torch.SymInt) and dim.node.expr.is_Symbol:
                hints[dim.node.expr] = int(dim.node.hint) if dim.node.has_hint() else 64  # type: ignore[arg-type]
    known = expr.subs(hints)
    return int(known.subs(dict.fromkeys(known.free_symbols, 64)))
