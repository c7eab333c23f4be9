"""Applies a plan to a canonical graph: each rule makes its edits, then the norms are written, once each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from normfx.checks.layouts import check_layouts, layouts
from normfx.edit import Edit
from normfx.edit.fusion import centres_output
from normfx.edit.writer import Rewritten, write_norms
from normfx.graph.views import settle
from normfx.ir import ops
from normfx.plan import Plan
from normfx.weights.live import live_folds


def apply_plan(
    gm: GraphModule,
    plan: Plan,
    values: Mapping[Node, Tensor] | None = None,
    options: Mapping[str, str] | None = None,
    share: bool = True,
) -> Rewritten:
    """Apply all decisions of a plan to a graph, which is changed.

    values:  present values of parameters, as far as they are known
    options: of the rules
    share:   norms that have become equal are computed once
    """
    edit, before = Edit(gm.graph, values or {}, options or {}), layouts(gm.graph)
    for decision in plan.applied():
        decision.rule.rewrite(decision.site, edit)
    for norm in plan.spelled:
        edit.norm(norm)
    if not plan.changes:
        return Rewritten()
    done = write_norms(edit, share)
    settle(gm)
    check_layouts(gm.graph, before)
    return done


def count_folds(graph: Graph, weights: frozenset[Node]) -> tuple[int, int]:
    """How many folds a rewritten graph computes in each call, and how many values it centres."""
    folds = live_folds(graph, [n for n in graph.nodes if n in weights])
    centrings = [n for n in graph.nodes if n.target in (ops.CENTER, ops.COMPRESS) and n not in folds]
    return len(folds), len(centrings) + sum(map(centres_output, graph.nodes))
