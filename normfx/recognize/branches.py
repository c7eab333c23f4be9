"""Sums of linears and convolutions that read one value, and of that value itself.

Backwards from a sum, through sums and products with numbers that nothing else reads, lie its terms. Terms that are
linear in one value x belong together, whatever else the sum adds. One of them, the host, is one layer with the largest
kernel; where the kernel of another one lies in it, their weights can be added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from normfx.compat.distributed import is_distributed
from normfx.graph.barriers import regions
from normfx.graph.facts import Facts
from normfx.graph.nodes import arguments, entries, entry_readers, op_name, shape, tensor, value
from normfx.graph.recompute import region_of
from normfx.ir.sites import BatchNorm, Branch, Branches, Linear
from normfx.recognize.layers import is_pointwise, layer
from normfx.recognize.moves import RESHAPES
from normfx.recognize.readers import is_ordinary, number_factor, of_parameters
from normfx.recognize.rows import same_shape

_SUMS = {"aten::add.Tensor": 1.0, "aten::sub.Tensor": -1.0, "aten::subtract.Tensor": -1.0}
_NEGATIONS = frozenset({"aten::neg", "aten::negative"})


def find_branches(facts: Facts, batch_norms: Iterable[BatchNorm]) -> Iterator[Branches]:
    """One for each value that two terms of a sum, or more, are linear in, in the order of the graph."""
    norms = {site.norm.output: site for site in batch_norms if not site.obstacle}
    where = {node: (region, region_of(node)) for node, region in regions(facts.graph).items()}
    inside: set[Node] = set()
    found: list[Branches] = []
    for node in reversed(facts.graph.nodes):
        if node in inside or op_name(node) not in _SUMS:
            continue
        terms = tuple(_terms(node, facts, where, inside))
        found += [_site(node, source, group, facts, where) for source, group in _groups(terms, facts, norms)]
    yield from reversed(found)


@dataclass(frozen=True)
class _Term:
    """A value that a sum adds, the factor it has there, and the nodes from what reads it to the whole sum."""

    top: Node
    factor: float
    path: tuple[Node, ...]


def _terms(root: Node, facts: Facts, where: Mapping[Node, Hashable], inside: set[Node]) -> Iterator[_Term]:
    """What a sum adds. The sums and products on the way are put `inside`."""
    work = [_Term(root, 1.0, ())]
    while work:
        term = work.pop()
        node = term.top
        alone = len(entry_readers(node)) == 1 and where[node] == where[root] and node not in facts.written
        parts = _parts(node) if node is root or (alone and node not in facts.parameters) else ()
        if parts and all(is_ordinary(term.factor * by) for _, by in parts):
            inside.add(node)
            work += [_Term(operand, term.factor * by, (node, *term.path)) for operand, by in reversed(parts)]
        else:
            yield term


def _parts(node: Node) -> tuple[tuple[Node, float], ...]:
    """The operands of a sum or of a product with a number, of the node's own shape and dtype, with their factors."""
    name = op_name(node)
    args = arguments(node) if name.startswith("aten::") else {}
    parts: tuple[tuple[Any, float], ...] = ()
    if name in _SUMS:
        alpha = args.get("alpha", 1)
        if isinstance(alpha, int | float):
            parts = ((args["self"], 1.0), (args["other"], _SUMS[name] * alpha))
        if args["other"] == 0:  # a number
            parts = parts[:1]
    elif name in _NEGATIONS:
        parts = ((args["self"], -1.0),)
    else:
        own = next((operand for operand in node.all_input_nodes), None)
        factor = None if own is None else number_factor(node, own)
        parts = () if own is None or factor is None else ((own, factor),)
    alike = all(_alike(operand, node) for operand, _ in parts) and len({operand for operand, _ in parts}) == len(parts)
    return parts if alike else ()


def _alike(operand: object, node: Node) -> bool:
    own, other = value(node), value(operand)
    if own is None or other is None or is_distributed(own) or not other.is_floating_point():
        return False
    return own.dtype == other.dtype and same_shape(tuple(own.shape), tuple(other.shape))


# ---------------------------------------------------------------- what a term is


@dataclass(frozen=True)
class _Step:
    """A layer and the value it reads. nodes: the layer, and the views before and after it that it alone reads or is
    read by"""

    layer: Linear
    source: Node
    nodes: tuple[Node, ...]


def _step(node: Node, facts: Facts) -> _Step | None:
    """The node as a layer, or as a matrix product of rows between two views that keep the rows."""
    found = layer(node, facts)
    if found is not None:
        return _Step(found, found.value, (node,))
    product = arguments(node)["self"] if op_name(node) in RESHAPES else node
    if not isinstance(product, Node) or op_name(product) != "aten::addmm":
        return None
    args = arguments(product)
    rows, source = args["mat1"], args["mat1"]
    if op_name(rows) in RESHAPES and _keeps_rows(arguments(rows)["self"], rows):
        source = arguments(rows)["self"]
    matrix = Linear(product, rows, args["mat2"], args["self"], "mat2", "self", 0)
    if args["beta"] != 1 or args["alpha"] != 1 or not of_parameters(matrix, facts.parameters):
        return None
    sizes = (*shape(matrix.weight), *shape(args["self"]))
    whole = all(isinstance(size, int) and size > 0 for size in sizes) and sizes[1:] == (sizes[1], sizes[1])
    rows_kept = whole and same_shape((*shape(source)[:-1], sizes[1]), shape(node))
    if not rows_kept or is_distributed(value(matrix.weight)):
        return None
    views = [rows] if rows is not source and len(entry_readers(rows)) == 1 else []
    return _Step(matrix, source, tuple(dict.fromkeys((*views, product, node))))


def _keeps_rows(source: object, rows: Node) -> bool:
    """Whether a view has the same rows, in the same order, along other dimensions."""
    fake = value(source)
    return fake is not None and fake.ndim > 0 and same_shape(tuple(fake.shape[-1:]), tuple(shape(rows)[-1:]))


def _readings(term: _Term, facts: Facts, norms: Mapping[Node, BatchNorm]) -> Iterator[tuple[Node, Branch]]:
    """The values that a term is linear in, each with the term as a map of it: the nearest first."""
    norm = norms.get(term.top)
    node = term.top if norm is None else norm.norm.input
    ends = () if norm is None else tuple(sorted(norm.norm.nodes))
    itself = Branch(term.top, term.factor, term.path, (), norm, ends)
    outer = _step(node, facts)
    if outer is not None:
        nodes = (*outer.nodes, *ends)
        yield outer.source, replace(itself, layers=(outer.layer,), nodes=nodes)
        inner = _step(outer.source, facts) if is_pointwise(outer.layer) else None
        if inner is not None and (inner.layer.groups, outer.layer.groups) in ((0, 0), (1, 1)):
            yield inner.source, replace(itself, layers=(outer.layer, inner.layer), nodes=(*inner.nodes, *nodes))
    if node not in facts.parameters:
        yield node, itself


def _groups(
    terms: tuple[_Term, ...], facts: Facts, norms: Mapping[Node, BatchNorm]
) -> Iterator[tuple[Node, list[Branch]]]:
    """Values that several terms are linear in, with these terms; each term once, the largest groups first, then those
    of the last value."""
    found: dict[Node, dict[Node, Branch]] = {}
    count = Counter(term.top for term in terms)
    free = {term.top for term in terms if count[term.top] == 1}
    for term in terms:
        for source, branch in _readings(term, facts, norms) if term.top in free else ():
            found.setdefault(source, {}).setdefault(term.top, branch)
    for source in sorted(sorted(found, reverse=True), key=lambda source: -len(found[source])):
        branches = [branch for top, branch in found[source].items() if top in free]
        if len(branches) > 1 and any(len(branch.layers) == 1 for branch in branches):
            free.difference_update(branch.top for branch in branches)
            yield source, branches


# ---------------------------------------------------------------- terms that belong together


def _site(root: Node, source: Node, branches: list[Branch], facts: Facts, where: Mapping[Node, Hashable]) -> Branches:
    """The terms with their host and with what speaks against adding their weights."""
    singles = [branch for branch in branches if len(branch.layers) == 1]
    host = max(singles, key=lambda branch: int(entries(shape(branch.layers[0].weight))))
    kernel = _Kernel.of(host.layers[0])
    host = replace(host, offsets=kernel.offsets(kernel))
    rest = [replace(b, offsets=_offsets(b, kernel, source, root)) for b in branches if b.top is not host.top]
    nodes = tuple(dict.fromkeys(node for branch in (host, *rest) for node in branch.nodes))
    own = {*nodes, *(node for branch in (host, *rest) for node in branch.path)}
    others = dict.fromkeys(user for node in nodes for user in entry_readers(node) if user not in own)
    added = [n for b in (host, *rest) for node in b.path for n in (node, *node.all_input_nodes)]  # other terms, too
    place = host.layers[0].node
    vectors = {branch: _vectors(branch) for branch in (host, *rest)}
    apart = [node for node in nodes if where[node] != where[root]]
    apart += [b.top for b in rest if not all(_reaches(vector, place, facts) for vector in vectors[b])]
    live = [vector for branch in (host, *rest) for vector in vectors[branch] if vector in facts.composed_live]
    return Branches(
        root,
        source,
        host,
        tuple(rest),
        tuple(others),
        tuple(dict.fromkeys(apart)),
        tuple(node for node in dict.fromkeys((source, *nodes, root, *added)) if node in facts.written),
        tuple(dict.fromkeys(live)),
    )


def _vectors(branch: Branch) -> list[Node]:
    """Weights, biases and statistics of a term."""
    norm = branch.norm
    own = [vector for part in branch.layers for vector in (part.weight, part.bias) if vector is not None]
    if norm is not None:
        own += [v for v in (norm.mean, norm.var, norm.norm.weight, norm.norm.bias) if v is not None]
    return own


def _reaches(vector: Node, place: Node, facts: Facts) -> bool:
    """Whether a vector can be read where the host runs, on its device."""
    return tensor(vector).device == tensor(place).device and facts.order.can_lift(vector, place)


@dataclass(frozen=True)
class _Kernel:
    """Where a layer reads: along each spatial dimension its size, stride, dilation and the zeros before the first
    entry. A linear has no such dimension."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    paddings: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, linear: Linear) -> _Kernel:
        if linear.groups == 0:
            return cls((), (), (), (), 0)
        args, sizes = arguments(linear.node), tuple(int(size) for size in shape(linear.weight)[2:])
        each = {name: _each(args[name], len(sizes)) for name in ("stride", "dilation")}
        padding = args["padding"]
        if isinstance(padding, str):
            same = (d * (k - 1) // 2 for d, k in zip(each["dilation"], sizes, strict=True))
            paddings = tuple(same) if padding == "same" else (0,) * len(sizes)
        else:
            paddings = _each(padding, len(sizes))
        return cls(sizes, each["stride"], each["dilation"], paddings, linear.groups)

    def itself(self) -> _Kernel:
        """The kernel that returns what it reads, next to this one."""
        ones, zeros = (1,) * len(self.sizes), (0,) * len(self.sizes)
        return _Kernel(ones, ones, ones, zeros, self.groups)

    def offsets(self, other: _Kernel) -> tuple[int, ...] | None:
        """The first entry of another kernel in this one: entry j of the other reads x at place·stride + j·d − p, and
        entry i of this one at place·stride + i·D − P, the same where i = j + (P − p)/D and d = D."""
        if (self.groups, self.strides) != (other.groups, other.strides):
            return None
        found = []
        for size, dilation, padding, k, d, p in zip(
            self.sizes, self.dilations, self.paddings, other.sizes, other.dilations, other.paddings, strict=True
        ):
            offset, rest = divmod(padding - p, dilation)
            if rest or offset < 0 or offset + k > size or (k > 1 and d != dilation):
                return None
            found.append(offset)
        return tuple(found)


def _each(given: Any, count: int) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, list | tuple) else (given,)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def _offsets(branch: Branch, host: _Kernel, source: Node, root: Node) -> tuple[int, ...] | None:
    """Where the kernel of a term lies in that of the host; None: it does not."""
    if branch.layers:
        inner = _Kernel.of(branch.layers[-1])
        return host.offsets(inner) if len(inner.sizes) == len(host.sizes) else None
    channels = branch.norm is None or bool(host.sizes) or len(shape(source)) == 2
    fits = channels and same_shape(shape(source), shape(root))
    return host.offsets(host.itself()) if fits else None
