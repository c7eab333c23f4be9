"""fold_negation: a minus sign after a norm moves into the norm's row factor.

    −(γ ⊙ z + β)  ==  γ ⊙ (−1·z) − β

It is normfx's own rule fold_scale with k = −1: identity, cost and edit are that rule's. This file says where the rule
applies and when it must not. docs/write-a-rule.md writes the whole rule, with a counterexample for each code.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from normfx.graph.nodes import grad_modes, op_name
from normfx.ir.sites import Scaled, Sites
from normfx.rules import fold_scale
from normfx.rules.rule import Code, Example, Objection, SoFar


def candidates(sites: Sites, so_far: SoFar) -> Iterator[Scaled]:
    """Each norm whose output goes into a minus sign: facts only, no decision."""
    for norm in sites.norms:
        for user in norm.output.users:
            if op_name(user) == "aten::neg":
                yield Scaled(norm, user, -1.0)


def guard(site: Scaled, so_far: SoFar) -> Iterator[Objection]:
    """Every objection, as (code, what was found, nodes)."""
    others = tuple(user for user in site.norm.output.users if user is not site.node)
    if others:
        yield "read_elsewhere", ", ".join(node.name for node in others), others
    modes = grad_modes(site.node.graph)
    if modes[site.node] != modes[site.norm.output]:
        yield "gradient_mode", site.node.name, (site.node,)
    if site.norm.fixed:
        yield "opaque_norm", site.norm.fixed, (site.norm.output,)


class Negated(nn.Module):
    """The rule's example: a norm and a minus sign."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return -self.norm(x)


RULE = replace(
    fold_scale.RULE,
    name="fold_negation",
    formula="−(γ⊙z + β) == γ⊙(−z) − β",
    source="docs/write-a-rule.md",
    codes={
        "read_elsewhere": Code("something else reads the norm's output", "none needed: the minus sign stays"),
        "gradient_mode": Code("gradients are recorded for one of the two only", "compute both in one mode"),
        "opaque_norm": Code("no canonical op says what the norm computes", "use nn.LayerNorm, over the features alone"),
    },
    candidates=candidates,
    guard=guard,
    summary="",
    example=Example("negated", Negated, lambda: (torch.linspace(-1.0, 2.0, 60).sin().reshape(2, 5, 6),)),
)
