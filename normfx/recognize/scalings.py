"""Scalings and shifts of each feature that belong to no norm: γ ⊙ f(x) + β with any f.

DyT is tanh(αx)·γ + β ("Transformers without Normalization", Zhu et al. 2025), and PowerNorm, Unified Normalization and
the layers of ResMLP end so. Nothing is known of the mean or the length of such a row, so each is a site of a kind of
its own, "Affine", which no rule takes for a norm: what may move is γ and β, into linears that read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from torch.fx import Node

from normfx.compat.distributed import is_distributed
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entry_readers, extent, is_one, occurrences, op_name, shape, tensor, value
from normfx.graph.recompute import region_of
from normfx.ir.affine import Affine, Step
from normfx.ir.sites import Axis, Norm, Readers
from normfx.recognize.bounded import DIVIDES, MULTIPLIES, is_bounded
from normfx.recognize.rows import same_shape

NO_NORM = "it scales and shifts each feature, and normalises nothing"

Naming = Callable[[Node], str]

_ADDS = {"aten::add.Tensor": 1.0, "aten::sub.Tensor": -1.0, "aten::subtract.Tensor": -1.0}


def find_scalings(facts: Facts, norms: Iterable[Norm], name: Naming, source: Naming) -> dict[Norm, Affine]:
    """The longest chains of such ops whose inner values nothing else reads, outside of norms."""
    inside = {node for norm in norms for node in norm.nodes}
    outputs = frozenset(norm.output for norm in norms if norm.kind != "BatchNorm")
    found: dict[Norm, Affine] = {}
    for node in facts.graph.nodes:
        if node in inside:
            continue
        chain = list(_chain(node, facts, frozenset(inside)))
        inside.update(end for end, _ in chain)
        axis = next((axis for _, (_, axis, _) in chain if axis is not None), None)
        if axis is None:  # numbers for all features alone
            continue
        steps = tuple(step for _, (_, _, steps) in chain for step in steps)
        (first, (start, _, _)), (end, _) = chain[0], chain[-1]
        affine = Affine(steps, is_bounded(start, outputs), _scales_rows(start, axis, facts))
        nodes = frozenset(node for node, _ in chain)
        found[_site(name(first), source(first), start, end, nodes, axis, affine)] = affine
    return found


def _site(name: str, source: str, start: Node, end: Node, nodes: frozenset[Node], axis: Axis, affine: Affine) -> Norm:
    weight, bias = (vectors[0] if vectors else None for vectors in (affine.factors, affine.terms))
    dtypes = tensor(start).dtype, tensor(end).dtype
    dims, eps = (axis.dim,), 0.0
    return Norm(
        name, "Affine", source, start, end, nodes, dims, axis.size, eps, "inside", 0, weight, bias, *dtypes, NO_NORM
    )


Link = tuple[Node, Axis | None, tuple[Step, ...]]
"""The value that an op scales or shifts, the axis of its vectors (None: they are numbers), and what it does."""


def _chain(node: Node, facts: Facts, inside: frozenset[Node]) -> Iterator[tuple[Node, Link]]:
    """The node and its only reader, and that one's, as long as they are links along one axis, in one mode."""
    axis: Axis | None = None
    before: Node | None = None
    while node not in inside and node not in facts.written and (link := link_of(node, facts)) is not None:
        start, own, _ = link
        if before is not None and (start is not before or region_of(node) != region_of(before)):
            return
        if start in facts.written or facts.modes[node] != facts.modes[start if before is None else before]:
            return
        if axis is not None and own is not None and own != axis:
            return
        yield node, link
        axis, before, readers = axis or own, node, entry_readers(node)
        if len(readers) != 1:
            return
        (node,) = readers


def link_of(node: Node, facts: Facts) -> Link | None:
    """The node as a scaling or shift of a value by vectors of parameters."""
    found = _operands(node, facts)
    if found is None or node in facts.parameters:
        return None
    start, steps = found
    own, rows = value(node), value(start)
    if own is None or rows is None or is_distributed(own) or start in facts.parameters or occurrences(node, start) != 1:
        return None
    if (
        not rows.is_floating_point()
        or not own.is_floating_point()
        or not same_shape(tuple(own.shape), tuple(rows.shape))
    ):
        return None
    axes = [_along(step.operand, start) for step in steps]
    vectors = {axis for axis in axes if axis is not None and axis.size > 1}
    if None in axes or len(vectors) > 1 or any(tensor(s.operand).device != own.device for s in steps):
        return None
    return start, next(iter(vectors), None), steps


def _operands(node: Node, facts: Facts) -> tuple[Node, tuple[Step, ...]] | None:
    """What is scaled or shifted, as far as the operands say, and by what."""
    name = op_name(node)
    if name not in (MULTIPLIES | DIVIDES | _ADDS.keys() | {"aten::addcmul"}):
        return None
    args = arguments(node)
    if name == "aten::addcmul":
        pairs = ((args["tensor1"], args["tensor2"]), (args["tensor2"], args["tensor1"]))
        for start, factor in pairs:
            if factor in facts.parameters and args["self"] in facts.parameters and args["value"] == 1:
                return start, (Step("mul", factor), Step("add", args["self"]))
        return None
    first, second = args["self"], args["other"]
    if isinstance(second, Node) and second in facts.parameters:
        alpha = args.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return None
        if name in _ADDS:
            return first, (Step("add", second, _ADDS[name] * alpha),)
        return first, (Step("div" if name in DIVIDES else "mul", second),)
    if first in facts.parameters and isinstance(second, Node):
        if name in MULTIPLIES:
            return second, (Step("mul", first),)
        if name == "aten::add.Tensor" and args.get("alpha", 1) == 1:
            return second, (Step("add", first),)
    return None


def _along(operand: Node, start: Node) -> Axis | None:
    """The axis of a value along which an operand has a number for each entry; of size 1 where it has one for all."""
    sizes, whole = shape(operand), shape(start)
    if not tensor(operand).is_floating_point() or len(sizes) > len(whole):
        return None
    first = len(whole) - len(sizes)
    wide = [dim for dim, size in enumerate(sizes) if not is_one(size)]
    if not wide:
        return Axis(0, 1)
    dim = first + wide[0]
    size = sizes[wide[0]]
    if len(wide) > 1 or not isinstance(size, int) or extent(whole[dim]) != size:
        return None
    return Axis(dim, size)


def _scales_rows(node: Node, axis: Axis, facts: Facts) -> bool:
    """Whether a value is a product with, or a quotient by, one number for each row that is computed from data."""
    if op_name(node) not in MULTIPLIES | DIVIDES:
        return False
    operands = [arguments(node)["self"], arguments(node)["other"]]
    fakes = [value(operand) for operand in operands]
    return any(
        fake is not None
        and fake.ndim == len(shape(node))
        and is_one(fake.shape[axis.dim])
        and o not in facts.parameters
        for o, fake in zip(operands, fakes, strict=True)
    )


def told(found: Mapping[Norm, Affine], readers: Mapping[Norm, Readers], norms: Iterable[Norm]) -> Iterator[Readers]:
    """Those that are worth a word in the report, with names of their own: a linear reads them, or they scale and shift,
    or scale rows that were scaled before. A gate or LayerScale that is added to a stream is none of these."""
    taken = Counter(norm.name.partition("#")[0] for norm in norms)
    for norm, affine in found.items():
        site = readers[norm]
        if site.linears or site.padded or (affine.factors and affine.terms) or affine.rows:
            base = norm.name or "affine"
            taken[base] += 1
            suffix = f"#{taken[base]}" if norm.name else f"_{taken[base] - 1}"
            own = base + suffix if taken[base] > 1 else base
            yield replace(site, affine=affine, norm=replace(norm, name=own))
