"""Which rule fires where, and why not elsewhere. Reads the sites; edits nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from normfx.ir.sites import Norm, Sites
from normfx.rules import RULES
from normfx.rules.rule import DISABLED, Cost, Refusal, Rule


@dataclass(frozen=True, eq=False)
class Decision:
    """One rule on one site: applied iff there are no refusals."""

    rule: Rule[Any]
    site: Any
    norms: tuple[Norm, ...]
    cost: Cost
    refusals: tuple[Refusal, ...]

    @property
    def applied(self) -> bool:
        return not self.refusals


@dataclass(frozen=True, eq=False)
class Plan:
    """All decisions of one graph, in rule order, and for each norm its share of them."""

    norms: tuple[Norm, ...]
    decisions: tuple[Decision, ...]

    def applied(self) -> Iterator[Decision]:
        return (d for d in self.decisions if d.applied)

    @cached_property
    def _by_norm(self) -> Mapping[Norm, list[Decision]]:
        found: dict[Norm, list[Decision]] = {norm: [] for norm in self.norms}
        for decision in self.decisions:
            for norm in decision.norms:
                found[norm].append(decision)
        return found

    def of(self, norm: Norm) -> tuple[Decision, ...]:
        return tuple(self._by_norm[norm])

    def rules(self, norm: Norm) -> tuple[str, ...]:
        """Names of the rules applied to a norm, in order."""
        return tuple(d.rule.name for d in self.of(norm) if d.applied)

    def refusals(self, norm: Norm) -> tuple[Refusal, ...]:
        return tuple(refusal for d in self.of(norm) for refusal in d.refusals)


def make_plan(sites: Sites, enabled: tuple[str, ...]) -> Plan:
    """Decide every candidate site of every rule; rules that are not enabled refuse."""
    return Plan(sites.norms, tuple(_decisions(sites, enabled)))


def _decisions(sites: Sites, enabled: tuple[str, ...]) -> Iterator[Decision]:
    for rule in RULES:
        for site in rule.candidates(sites):
            refusals = rule.refusals(site) if rule.name in enabled else (_disabled(rule),)
            yield Decision(rule, site, rule.norms(site), rule.cost(site), refusals)


def _disabled(rule: Rule[Any]) -> Refusal:
    return Refusal(rule.name, "disabled", DISABLED.meaning, DISABLED.hint.replace("RULE", rule.name))


def refusal_codes() -> Mapping[str, Mapping[str, str]]:
    """Every refusal code of every rule with its meaning: the table of docs/refusals.md."""
    table = {rule.name: {code: known.meaning for code, known in rule.codes.items()} for rule in RULES}
    return {name: {**codes, "disabled": DISABLED.meaning} for name, codes in table.items()}
