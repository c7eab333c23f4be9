"""Applies a plan to a canonical graph: each rule makes its edits, then the norms are written, once each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from normfx.edit import Edit
from normfx.edit.writer import Rewritten, write_norms
from normfx.plan import Plan


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
    edit = Edit(gm.graph, values or {}, options or {})
    for decision in plan.applied():
        decision.rule.rewrite(decision.site, edit)
    for norm in plan.spelled:
        edit.norm(norm)
    if not plan.changes:
        return Rewritten()
    done = write_norms(edit, share)
    gm.graph.lint()
    gm.recompile()
    return done
