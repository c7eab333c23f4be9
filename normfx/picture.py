"""The residual streams of a graph as records, in the order of the graph: what a picture of them is drawn from.

A stream is read off the sums, whether anything was proved of it or not: backwards from the input of every norm, through
sums of two activations and ops that pass rows on, until something else writes a value. A norm whose result enters a sum
again (post-norm) continues its stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import sympy
from torch.fx import Graph, Node

from normfx.edit.writer import Rewritten
from normfx.graph.names import module_path, source_line
from normfx.graph.nodes import is_getitem, op_name, value
from normfx.ir.sites import Norm, Readers, Sites
from normfx.plan import Plan
from normfx.printing.printer import describe
from normfx.recognize.readers import NUMBER_SCALES, ROW_OPS
from normfx.records import CostReport, Picture, StepReport
from normfx.rules.cut import Part

SUMS = frozenset({"aten::add.Tensor", "aten::add_.Tensor", "aten::sub.Tensor"})


def draw(graph: Graph, sites: Sites, plan: Plan, names: Mapping[Node, str], lines: Mapping[Node, int]) -> Picture:
    """The picture of a graph that is not rewritten yet. names: of its inputs; lines: of its text, by node."""
    weights = frozenset(node for node in names if node not in lines)
    found = _walk(plan.norms, weights)
    readers = {**sites.readers, **{site.norm: site for site in sites.affines}}
    return Picture(
        tuple(_steps(graph, plan, found, names, lines)),
        tuple(tuple(_readers(readers.get(norm))) for norm in plan.norms),
        tuple(tuple(_costs(plan, norm)) for norm in plan.norms),
        tuple(tuple(sorted({lines[node] for node in norm.nodes if node in lines})) for norm in plan.norms),
    )


# ---------------------------------------------------------------- streams


@dataclass
class _Found:
    """sums, writers: values of streams; inline: norms whose result is in one; above: a value towards its root."""

    sums: dict[Node, None] = field(default_factory=dict)
    writers: dict[Node, None] = field(default_factory=dict)
    inline: dict[Node, Norm] = field(default_factory=dict)
    above: dict[Node, Node] = field(default_factory=dict)

    def root(self, node: Node) -> Node:
        while (above := self.above.get(node, node)) is not node:
            self.above[node] = self.above.get(above, above)
            node = above
        return node

    def join(self, one: Node, other: Node) -> None:
        self.above[self.root(one)] = self.root(other)


def _walk(norms: Iterable[Norm], weights: frozenset[Node]) -> _Found:
    found, outputs = _Found(), {norm.output: norm for norm in norms}
    work = []
    for norm in outputs.values():
        origin = _origin(norm.input, outputs, weights)
        found.join(norm.input, origin)
        work.append(origin)
    seen: set[Node] = set()
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in outputs:
            found.inline[node] = outputs[node]
            found.join(node, outputs[node].input)
        elif operands := _operands(node, weights):
            found.sums[node] = None
            for operand in operands:
                origin = _origin(operand, outputs, weights)
                found.join(origin, node)
                work.append(origin)
        else:
            found.writers[node] = None
    return found


def _operands(node: Node, weights: frozenset[Node]) -> tuple[Node, ...]:
    """The two values that a sum of a stream adds, or none: a bias is not written into a stream by itself."""
    if op_name(node) not in SUMS or len(node.args) < 2:
        return ()
    operands = [n for n in node.args[:2] if isinstance(n, Node) and (fake := value(n)) is not None and fake.ndim > 1]
    return tuple(operands) if len(operands) == 2 and not all(_is_weight(n, weights) for n in operands) else ()


def _origin(node: Node, outputs: Mapping[Node, Norm], weights: frozenset[Node]) -> Node:
    """What computes a value, ops left aside that pass its rows on, scale them or add a bias."""
    while node not in outputs and not _operands(node, weights):
        name, operands = op_name(node), node.all_input_nodes
        if name in ROW_OPS or is_getitem(node):
            inner = operands[:1]
        elif name in SUMS or name in NUMBER_SCALES:
            inner = [n for n in operands if not _is_weight(n, weights)]
        else:
            return node
        if len(inner) != 1:
            return node
        (node,) = inner
    return node


def _is_weight(node: Node, weights: frozenset[Node]) -> bool:
    """Whether a value is a weight, or computed from weights in one step, as autocast does."""
    inputs = node.all_input_nodes
    return node in weights or (bool(inputs) and all(n in weights for n in inputs))


def _steps(
    graph: Graph, plan: Plan, found: _Found, names: Mapping[Node, str], lines: Mapping[Node, int]
) -> Iterator[StepReport]:
    places = {norm.output: i for i, norm in enumerate(plan.norms)}
    centred = _centred(plan)
    numbers: dict[Node, int] = {}
    sources: dict[str, str] = {}

    def source(node: Node) -> str:
        trace = node.meta.get("stack_trace") or ""
        if trace not in sources:  # equal blocks share their lines
            sources[trace] = source_line(node)
        return sources[trace]

    for node in graph.nodes:
        kind = "norm" if node in places else "sum" if node in found.sums else "writer" if node in found.writers else ""
        if not kind:
            continue
        norm = plan.norms[places[node]] if kind == "norm" else None
        stream = numbers.setdefault(found.root(norm.input if norm else node), len(numbers))
        yield StepReport(
            kind,
            stream,
            norm.name if norm else names.get(node) or module_path(node) or node.name,
            norm.kind if norm else _operator(node, lines),
            describe(value(node)),
            lines.get(node, -1),
            places.get(node, -1),
            node in found.inline,
            node in centred,
            norm.source if norm else source(node),
        )


def _centred(plan: Plan) -> set[Node]:
    """Values whose mean is zero after the rewrite: those inside of centred streams and what only these read."""
    streams = [d.site.stream for d in plan.applied() if isinstance(d.site, Part) and d.rule.makes_rms_norms]
    entering = {leaf.node for stream in streams for leaf in stream.leaves if leaf.alone}
    return entering.union(*(stream.axes for stream in streams))


# ---------------------------------------------------------------- norms


def _readers(readers: Readers | None) -> Iterator[str]:
    if readers is None:
        return
    for linear, _, _ in readers.linears:
        yield f"{module_path(linear.node) or linear.node.name} (linear)"
    for node in (*readers.others, *readers.packed):
        yield f"{module_path(node) or node.name} ({_operator(node)})" if node.op != "output" else "the graph's output"


def _operator(node: Node, lines: Mapping[Node, int] | None = None) -> str:
    """'linear' of a call; of an input, whether it is a parameter: lines are those of the others."""
    if node.op in ("placeholder", "get_attr"):
        return "input" if lines is None or node in lines else "parameter"
    return op_name(node).removeprefix("aten::").partition(".")[0] or getattr(node.target, "__name__", node.op)


def _costs(plan: Plan, norm: Norm) -> Iterator[CostReport]:
    for decision in plan.of(norm):
        if decision.applied:
            cost = decision.cost
            yield CostReport(decision.rule.name, size(cost.before), size(cost.after), len(decision.norms))


@lru_cache(maxsize=4096)
def size(size: sympy.Expr) -> str:
    """Bytes as text, "4,096" or with symbols of the graph."""
    return f"{int(size):,}" if size.is_Integer else str(sympy.expand(size))


def places(norms: Iterable[Norm], done: Rewritten, lines: Mapping[Node, int], text: str) -> list[tuple[int, ...]]:
    """Lines of each norm in the text of the rewritten graph: by node, or by the module path that the text names where
    the norm was written once more since (lower/native.py)."""
    named: dict[str, list[int]] = {}
    for i, line in enumerate(text.splitlines()):
        _, comment, path = line.partition("  # ")
        if comment:
            named.setdefault(path, []).append(i)
    found = []
    for norm in norms:
        written = done.written.get(done.shared.get(norm, norm))
        nodes = norm.nodes if written is None else (written,)
        own = sorted({lines[node] for node in nodes if node in lines})
        path, _, call = norm.name.partition("#")
        calls = named.get(path, [])[int(call or 1) - 1 :]
        found.append(tuple(own or calls[:1]))
    return found
