"""What normfx did to a model and why: plans and graphs → text, JSON, HTML. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch.fx import Graph, Node

from normfx.compat.operators import OpOverload, schema
from normfx.graph.names import source_line
from normfx.graph.nodes import bytes_of, size_hint, value
from normfx.ir.sites import Composition, Norm
from normfx.picture import size
from normfx.plan import Plan
from normfx.records import FailureReport, FoldReport, GraphBreak, GraphReport, RefusalReport, SiteReport
from normfx.report_html import page
from normfx.report_text import lines
from normfx.rules.rule import Refusal

__all__ = [
    "FailureReport",
    "FoldReport",
    "GraphBreak",
    "GraphReport",
    "RefusalReport",
    "Report",
    "SiteReport",
    "graph_report",
]

VERSION = 1
"""The version of the JSON form."""

_KINDS = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "BatchNorm": "batch_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
    "Affine": "affine",
}


@dataclass(frozen=True)
class Report:
    """All graphs of a model, in the order in which they were captured.

    breaks: places at which Dynamo ended a graph, where they are known
    note:   why there are no graphs, where it is known, or what else there is to know
    environment: versions, device and options that it holds for

    `str(report)` is plain text of 80 columns, `rich.print(report)` the same with colours where the terminal has them.
    """

    graphs: tuple[GraphReport, ...]
    graph_breaks: int = 0
    breaks: tuple[GraphBreak, ...] = ()
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def composed(self) -> tuple[SiteReport, ...]:
        """Weights that the graphs compute from parameters alone, of kind "Weight", pairs of linear layers with nothing
        between, of kind "Linear", and sums of branches that read one value, of kind "Branches"."""
        return tuple(site for graph in self.graphs for site in graph.composed)

    @property
    def counts(self) -> dict[str, int]:
        """Norms by kind, "to_rms_norm", a count for each applied rule, graphs and graph breaks, run-time centrings."""
        kinds = Counter(_KINDS[site.kind] for site in self.sites)
        rules = Counter(rule for site in (*self.sites, *self.composed) for rule in site.rules)
        counts = {name: kinds[name] for name in _KINDS.values() if kinds[name] or name in ("layer_norm", "rms_norm")}
        counts["to_rms_norm"] = sum(site.to_rms_norm for site in self.sites)
        counts.update(sorted(rules.items()))
        counts["centrings"] = sum(graph.centrings for graph in self.graphs)
        counts["folds"] = sum(graph.folds for graph in self.graphs)
        counts["graphs"] = len(self.graphs)
        counts["graph_breaks"] = self.graph_breaks
        return counts

    def __str__(self) -> str:
        return "\n".join("".join(text for text, _ in line) for line in lines(self.graphs, self.breaks, self.note))

    def __rich__(self) -> Text:
        """The same text, coloured."""
        text = Text(no_wrap=True, overflow="ignore")
        for i, line in enumerate(lines(self.graphs, self.breaks, self.note)):
            text.append("\n" if i else "")
            for piece in line:
                text.append(*piece)
        return text

    def to_json(self) -> str:
        """The whole report as JSON text. "version" is that of the form: it rises when a name changes its meaning."""
        return json.dumps(self._data(), indent=2)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs nothing outside of itself."""
        text = page(self.graphs, self.breaks, self.note, self.environment, self._data())
        Path(path).write_text(text, encoding="utf-8")

    def _data(self) -> dict[str, Any]:
        graphs, breaks = [asdict(graph) for graph in self.graphs], [asdict(each) for each in self.breaks]
        own = {"version": VERSION, "counts": self.counts, "note": self.note, "environment": dict(self.environment)}
        return {**own, "breaks": breaks, "graphs": graphs}


def graph_report(
    plan: Plan,
    before: str,
    after: str,
    source_of: Callable[[Node], str],
    counts: tuple[int, int],
    seconds: Mapping[str, float],
    names: Mapping[Node, str],
    excess: frozenset[Node] = frozenset(),
) -> GraphReport:
    """The report of one graph. counts: live folds, run-time centrings; names: of the graph's inputs; excess: weights
    whose folds could be kept, but do not fit into the memory that they may take."""

    def refusals(site: Norm | Composition) -> tuple[RefusalReport, ...]:
        return tuple(refusal(r) for r in plan.refusals(site))

    def refusal(r: Refusal) -> RefusalReport:
        source = next(filter(None, map(source_line, r.nodes)), "")
        return RefusalReport(
            r.rule, r.code, r.detail, _hint(r, names, excess), tuple(map(place, r.nodes)), r.meaning, source
        )

    def place(node: Node) -> str:
        return _place(node, source_of)

    sites = tuple(
        SiteReport(
            norm.name,
            norm.kind,
            plan.rules(norm),
            refusals(norm),
            norm.source,
            "two-pass" if norm in plan.spelled else "inductor",
        )
        for norm in plan.norms
    )
    composed = tuple(
        SiteReport(place(site.node), site.kind, plan.rules(site), refusals(site), "") for site in plan.composed
    )
    costs = plan.costs()
    sizes = {rule: (size(cost.before), size(cost.after)) for rule, cost in costs.items()}
    sized = [norm.input for norm in plan.norms] + [site.node for site in plan.composed]
    saved = {rule: size_hint(cost.before - cost.after, sized) for rule, cost in costs.items()}
    return GraphReport(sites, before, after, {}, *counts, dict(seconds), composed=composed, bytes=sizes, saved=saved)


def largest_result(graph: Graph) -> int:
    """Bytes of the largest tensor that is computed and returned on the CPU, at the sizes of the captured call."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if _in_memory(node)]
    returned = {_viewed(node) for node in graph.output_node().all_input_nodes}
    made = [node for node in returned if node.op == "call_function" and _in_memory(node)]
    return max((size_hint(bytes_of(node), (*inputs, node)) for node in made), default=0)


def _in_memory(node: Node) -> bool:
    """Whether a value is a plain tensor on the CPU."""
    val = value(node)
    return val is not None and val.device.type == "cpu" and val.layout is torch.strided and not val.is_nested


def _viewed(node: Node) -> Node:
    """What a view is a view of."""
    while isinstance(node.target, OpOverload) and any(r.alias_info for r in schema(node.target).returns):
        node = node.all_input_nodes[0]
    return node


def _hint(refusal: Refusal, names: Mapping[Node, str], excess: frozenset[Node]) -> str:
    """The refusal's hint, unless memory is short, or what is in the way comes from another graph, or goes to one."""
    if refusal.code in ("live_weights", "live") and any(excess & {n, *n.all_input_nodes} for n in refusal.nodes):
        return (
            "folded weights do not fit into the memory that they may take: raise options={'fold_memory': …}, or free "
            "memory of the machine"
        )
    if refusal.code == "uncentred_input":
        entering = [names.get(node, node.name) for node in refusal.nodes if node.op == "placeholder"]
        if entering:
            return (
                f"{entering[0]} is computed outside of this graph: if another part of the model computes it, compile "
                "the whole model, without graph breaks"
            )
    if refusal.code == "observed" and any(node.op == "output" for node in refusal.nodes):
        return (
            "do not return it; if only another part of the model reads it, compile the whole model, without graph "
            "breaks"
        )
    return refusal.hint


def _place(node: Node, source_of: Callable[[Node], str]) -> str:
    where = source_of(node)
    return f"{node.name} in {where}" if where else node.name
