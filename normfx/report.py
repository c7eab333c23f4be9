"""What normfx did to a model and why: plans and graphs → text, JSON, HTML. Pure."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy
from torch.fx import Node

from normfx.ir.sites import Composed, Norm
from normfx.plan import Plan


@dataclass(frozen=True)
class RefusalReport:
    """Why a rule left a norm alone; `nodes` are graph values with the module they belong to."""

    rule: str
    code: str
    detail: str
    hint: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class SiteReport:
    """One norm: its module path, kind, the rules applied in order, the refusals, and where it is written.

    lowering: on a CUDA device, and everywhere under lowering="triton", "triton: ", the kernel and the bytes it must
              move, or "inductor: " and why there is no kernel, or why Inductor is ahead of it; else "two-pass" where a
              norm that stays is spelled out, "inductor" where it is not
    shares:   an earlier norm of the same value whose result is also this one's ("" if there is none)
    """

    name: str
    kind: str
    rules: tuple[str, ...]
    refusals: tuple[RefusalReport, ...]
    source: str
    lowering: str = "inductor"
    shares: str = ""

    @property
    def to_rms_norm(self) -> bool:
        """Whether a LayerNorm became an RMSNorm here."""
        return self.kind == "LayerNorm" and bool({"pre_rms_norm", "linear_norm", "crms_norm"} & set(self.rules))


@dataclass(frozen=True)
class FoldReport:
    """What became of the folded weights of a compiled graph.

    variants:       those that exist: "live" or "cached", and "frozen"
    bytes:          of the kept values of one parameter set
    parameter_sets: sets of parameters the graph was called with whose folds are kept
    refreshes:      kept values computed so far, the first time included
    freezes:        times the frozen variant was built
    """

    variants: tuple[str, ...] = ()
    bytes: int = 0
    parameter_sets: int = 0
    refreshes: int = 0
    freezes: int = 0

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB of folded weights, {self.parameter_sets} parameter sets"
        return f"{' + '.join(self.variants)}: {size}, {self.refreshes} values computed, frozen {self.freezes} times"


@dataclass(frozen=True)
class GraphReport:
    """One captured graph. before, after: printer text; kernels: name → generated source; seconds: per stage.

    weights:  None where nothing was compiled
    bytes:    by rule, predicted for a call: what passes over the activations it touches and over live weights read and
              write, before and after, as text with the graph's symbolic sizes
    composed: weights computed from parameters alone, of kind "Weight"
    stored_sums: sums of residual streams that Inductor is told to store once; they are not in `after`
    """

    sites: tuple[SiteReport, ...]
    before: str = ""
    after: str = ""
    kernels: Mapping[str, str] = field(default_factory=dict)
    folds: int = 0
    centrings: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    weights: FoldReport | None = None
    composed: tuple[SiteReport, ...] = ()
    bytes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    stored_sums: int = 0

    def with_lowering(self, lowering: Iterable[str | None], kernels: Mapping[str, str]) -> GraphReport:
        """The same, with what each site runs on where that is known, and the sources of kernels."""
        sites = (replace(site, lowering=own or site.lowering) for site, own in zip(self.sites, lowering, strict=True))
        return replace(self, sites=tuple(sites), kernels=dict(kernels))

    def with_shared(self, shared: Iterable[Norm | None]) -> GraphReport:
        """The same, with the norm that each site shares its result with."""
        pairs = zip(self.sites, shared, strict=True)
        return replace(self, sites=tuple(replace(site, shares=norm.name if norm else "") for site, norm in pairs))


_KINDS = {
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "BatchNorm": "batch_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
}


@dataclass(frozen=True)
class Report:
    """All graphs of a model, in the order in which they were captured."""

    graphs: tuple[GraphReport, ...]
    graph_breaks: int = 0

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def composed(self) -> tuple[SiteReport, ...]:
        """Weights that the graphs compute from parameters alone, as sites of kind "Weight"."""
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
        lines = [", ".join(f"{name}: {n}" for name, n in self.counts.items())]
        width = max((len(site.name) for site in self.sites), default=0)
        said: dict[tuple[str, str, str], str] = {}
        for site in (*self.sites, *(w for w in self.composed if w.rules)):
            shares = f" (computed by {site.shares})" if site.shares else ""
            lines.append(f"{site.name:{width}}  {site.kind:9}  {', '.join(site.rules) or '-'}{shares}")
            for r in site.refusals:
                first = said.setdefault((r.rule, r.code, r.detail), site.name)
                reason = r.detail if first == site.name else f"as for {first}"
                lines.append(f"  {r.rule} refused ({r.code}): {reason}")
        for i, graph in enumerate(self.graphs):
            if graph.bytes:
                changes = ", ".join(f"{rule} {before} to {after}" for rule, (before, after) in graph.bytes.items())
                lines.append(f"graph {i}: predicted bytes a call: {changes}")
            if graph.stored_sums:
                lines.append(f"graph {i}: {graph.stored_sums} sums of residual streams are stored once")
        lines += [f"graph {i}: {graph.weights}" for i, graph in enumerate(self.graphs) if graph.weights]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The whole report as JSON text."""
        return json.dumps({"counts": self.counts, "graphs": [asdict(graph) for graph in self.graphs]}, indent=2)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(_html(self), encoding="utf-8")


def graph_report(
    plan: Plan,
    before: str,
    after: str,
    source_of: Callable[[Node], str],
    counts: tuple[int, int],
    seconds: Mapping[str, float],
) -> GraphReport:
    """The report of one graph. counts: live folds, run-time centrings."""

    def refusals(site: Norm | Composed) -> tuple[RefusalReport, ...]:
        found = plan.refusals(site)
        return tuple(RefusalReport(r.rule, r.code, r.detail, r.hint, tuple(map(place, r.nodes))) for r in found)

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
        SiteReport(place(site.node), "Weight", plan.rules(site), refusals(site), "") for site in plan.composed
    )
    sizes = {rule: (_size(cost.before), _size(cost.after)) for rule, cost in plan.costs().items()}
    return GraphReport(sites, before, after, {}, *counts, dict(seconds), composed=composed, bytes=sizes)


def _size(size: sympy.Expr) -> str:
    return f"{int(size):,}" if size.is_Integer else str(sympy.expand(size))


def _place(node: Node, source_of: Callable[[Node], str]) -> str:
    where = source_of(node)
    return f"{node.name} in {where}" if where else node.name


def _html(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{_cell(s.name)}</td><td>{s.kind}</td><td>{_cell(', '.join(s.rules))}</td><td>"
        + "<br>".join(f"<b>{r.rule}: {r.code}</b> {_cell(r.detail)} <i>{_cell(r.hint)}</i>" for r in s.refusals)
        + f"</td><td>{_cell(s.source)}</td></tr>"
        for s in report.sites
    )
    graphs = "".join(
        f"<details><summary>graph {i}: {len(g.sites)} norms</summary><h3>before</h3><pre>{_cell(g.before)}</pre>"
        f"<h3>after</h3><pre>{_cell(g.after)}</pre></details>"
        for i, g in enumerate(report.graphs)
    )
    counts = ", ".join(f"{name}: {n}" for name, n in report.counts.items())
    style = "body{font-family:sans-serif}td{vertical-align:top;padding:2px 8px}pre{background:#f4f4f4;padding:8px}"
    head = _row("th", ("norm", "kind", "applied", "refused", "source"))
    return (
        f'<!doctype html><meta charset="utf-8"><title>normfx report</title><style>{style}</style>'
        f"<h1>normfx</h1><p>{counts}</p><table>{head}{rows}</table>{graphs}"
    )


def _row(tag: str, cells: Iterable[Any]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_cell(str(c))}</{tag}>" for c in cells) + "</tr>"


def _cell(text: str) -> str:
    return html.escape(text)
