"""Which rule fires where, and why not elsewhere. Reads the sites; edits nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy

from normfx.ir.sites import Composition, Norm, Sites
from normfx.rules import RULES
from normfx.rules.cut import cut
from normfx.rules.device import GPU, device_costs
from normfx.rules.rule import DISABLED, NOT_EXPORTED, Code, Cost, Decision, Refusal, Rule, S, SoFar

Says = Callable[[Norm], bool]


@dataclass(frozen=True, eq=False)
class Plan:
    """All decisions of one graph, in rule order, and for each norm, composed weight, pair of linears or sum of branches
    its part.

    spelled: norms that no rule touches and that become canonical ops: a LayerNorm in two passes, or a kernel
    """

    norms: tuple[Norm, ...]
    decisions: tuple[Decision[Any], ...]
    spelled: tuple[Norm, ...] = ()
    composed: tuple[Composition, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything is to be rewritten."""
        return bool(self.spelled) or any(True for _ in self.applied())

    def applied(self) -> Iterator[Decision[Any]]:
        return (d for d in self.decisions if d.applied)

    @cached_property
    def _by_norm(self) -> Mapping[Norm | Composition, list[Decision[Any]]]:
        found: dict[Norm | Composition, list[Decision[Any]]] = dict()
        found.update({norm: [] for norm in self.norms})
        found.update({weight: [] for weight in self.composed})
        for decision in self.decisions:
            for norm in decision.norms:
                found[norm].append(decision)
        return found

    def of(self, norm: Norm | Composition) -> tuple[Decision[Any], ...]:
        return tuple(self._by_norm[norm])

    def rules(self, norm: Norm | Composition) -> tuple[str, ...]:
        """Names of the rules applied to a norm, in order."""
        return tuple(d.rule.name for d in self.of(norm) if d.applied)

    def costs(self) -> Mapping[str, Cost]:
        """What each applied rule changes: the sum of its decisions' bytes before and after."""
        found: dict[str, Cost] = {}
        for d in self.applied():
            so_far = found.get(d.rule.name, Cost(sympy.Integer(0), sympy.Integer(0)))
            found[d.rule.name] = Cost(so_far.before + d.cost.before, so_far.after + d.cost.after)
        return found

    def refusals(self, norm: Norm | Composition) -> tuple[Refusal, ...]:
        return tuple(refusal for d in self.of(norm) for refusal in d.refusals)


def make_plan(
    sites: Sites,
    enabled: tuple[str, ...],
    spells: Says = lambda norm: False,
    kernels: Says = lambda norm: False,
    options: Mapping[str, str] | None = None,
    exported: bool = False,
) -> Plan:
    """Decide every candidate site of every rule; rules that are not enabled refuse.

    spells:  whether a norm that no rule touches is to become a canonical op, if rules are enabled at all
    kernels: whether a generated kernel may run a norm
    options: of the rules
    exported: the graph is that of an exported program
    """
    decisions = _decisions(sites, enabled, kernels, options or {}, exported)
    touched = {norm for decision in decisions if decision.applied for norm in decision.norms}
    stays = (norm for norm in sites.norms if norm not in touched and enabled)
    return Plan(sites.norms, decisions, tuple(filter(spells, stays)), (*sites.composed, *sites.pairs, *sites.branches))


def _decisions(
    sites: Sites, enabled: tuple[str, ...], kernels: Says, options: Mapping[str, str], exported: bool
) -> tuple[Decision[Any], ...]:
    """First which parts of streams to centre, for what it saves; then, rule by rule, what is right and pays."""
    so_far = SoFar(cut(sites.streams), options=options)
    for rule in RULES:
        if rule.name in enabled or rule.default:
            off = DISABLED if rule.name not in enabled else NOT_EXPORTED if exported and not rule.exported else None
            made = tuple(_decide(rule, sites, so_far, off, kernels))
            so_far = replace(so_far, decisions=(*so_far.decisions, *made))
    return so_far.decisions


def _decide(rule: Rule[S], sites: Sites, so_far: SoFar, off: Code | None, kernels: Says) -> Iterator[Decision[S]]:
    for site in rule.candidates(sites, so_far):
        on_gpu = [norm for norm in site.norms if isinstance(norm, Norm) and device_costs(norm.output) is GPU]
        if rule.for_kernels and on_gpu and not any(map(kernels, on_gpu)):
            continue
        refusals = rule.refusals(site, so_far) if off is None else (_off(rule, off),)
        yield Decision(rule, site, rule.cost(site), refusals)


def _off(rule: Rule[Any], why: Code) -> Refusal:
    hint = why.hint.replace("NAME", rule.name)
    return Refusal(rule.name, _OFF[why], why.meaning, hint, meaning=why.meaning)


_OFF = {DISABLED: "disabled", NOT_EXPORTED: "not_exported"}
"""The codes of rules that are not asked."""


def refusal_codes() -> Mapping[str, Mapping[str, str]]:
    """Every refusal code of every rule with its meaning: the table of docs/refusals.md."""
    table = {}
    for rule in RULES:
        off = {_OFF[why]: why for why in (DISABLED, *(() if rule.exported else (NOT_EXPORTED,)))}
        table[rule.name] = {code: known.meaning for code, known in {**rule.codes, **off}.items()}
    return table
