"""What a rule is, and why it may refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import sympy
import torch
from torch.fx import Node

from normfx.edit import Edit
from normfx.ir.sites import Composition, Norm, Sites
from normfx.rules.cut import Part


class Site(Protocol):
    """What a rule decides: something in a graph that concerns some norms, or weights."""

    @property
    def norms(self) -> tuple[Norm | Composition, ...]: ...


S = TypeVar("S", bound=Site)

Objection = tuple[str, str, tuple[Node, ...]]
"""The code of a refusal, what was found, and the graph values in the way."""


@dataclass(frozen=True)
class Code:
    """A kind of refusal: what it means, and the nearest thing a user can do about it."""

    meaning: str
    hint: str


DISABLED = Code("the rule is switched off", "enable it with options={'rules': 'default,+NAME'} or NORMFX_RULES")
NOT_EXPORTED = Code(
    "the rule's op would be written out again in an exported program",
    "none needed: what compiles the program may compute its ops together",
)


@dataclass(frozen=True)
class Refusal:
    """Why a rule left a norm alone. `nodes` names the graph values in the way; `detail` begins with `meaning`."""

    rule: str
    code: str
    detail: str
    hint: str
    nodes: tuple[Node, ...] = ()
    meaning: str = ""


@dataclass(frozen=True)
class Cost:
    """Bytes that passes over activations and live weights read or write, before and after, in the graph's symbolic
    sizes. A pass counts whether it meets memory or a cache: of rows that fit into a cache it is what takes the time."""

    before: sympy.Expr
    after: sympy.Expr


class Symbols(Protocol):
    """Makes an object array of sympy symbols: symbols("x", 3) or symbols("W", 2, 3)."""

    def __call__(self, name: str, *shape: int) -> Any: ...


@dataclass(frozen=True)
class Example:
    """A small module that shows a rule at work or, with `code`, refused. Shapes: `inputs` gives its arguments.

    fold: the option under which it does; "live" decides as if weights were free
    options: more of them
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    code: str = ""
    fold: str = "live"
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Decision(Generic[S]):
    """One rule on one site: applied iff there are no refusals."""

    rule: Rule[S]
    site: S
    cost: Cost
    refusals: tuple[Refusal, ...]

    @property
    def applied(self) -> bool:
        return not self.refusals

    @property
    def norms(self) -> tuple[Norm | Composition, ...]:
        return self.site.norms


@dataclass(frozen=True, eq=False)
class SoFar:
    """What is decided of a graph when a rule's turn comes: the cut, and the decisions of all earlier rules; and the
    options of the rules."""

    parts: tuple[Part, ...]
    decisions: tuple[Decision[Any], ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def applied(self, rule: Rule[S]) -> tuple[S, ...]:
        """The sites to which a rule is applied."""
        return tuple(d.site for d in self.decisions if d.applied and d.rule is rule)

    @cached_property
    def centred(self) -> tuple[Part, ...]:
        """The parts of streams that are centred: rules have made RMSNorms of their norms."""
        norms = {n for d in self.decisions if d.applied and d.rule.makes_rms_norms for n in d.norms}
        return tuple(part for part in self.parts if norms.issuperset(part.norms))


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One identity, where it may be applied, and how.

    identity(symbols, d): pairs (lhs, rhs) of sympy expressions that must be equal
    mistake:              a formula that the identity uses, as "module.function" of normfx.rules, and a wrong one, with
                          which the identity must not hold: else the proof proves nothing
    candidates(sites, so_far): the sites of a graph to decide
    guard(site, so_far):  every objection; none means apply. It asks what was decided so far, never what a rule would
                          decide
    cost:                 bytes before and after; a guard may object to it
    rewrite(site, edit):  the edits, in terms of normfx.edit.Edit
    default:              among the default rules; of one that is not, the report says nothing unless it is asked for
    makes_rms_norms:      the LayerNorms that it is applied to become RMSNorms
    exported:             it is applied to exported programs too (normfx.rewrite); not where all that it does is to make
                          one op of several, since a program holds ATen ops alone
    for_kernels:          on a GPU it serves generated kernels alone: not decided where none may run a site's norm
    options:              options of its own that a user may give, each with its values, the default first
    summary:              what the report's first sentence says of the norms that it was applied to: "{norms} {are} …"
                          makes "5 LayerNorms: 3 are …", with "1" or "all" for {norms} where it is so many
    """

    name: str
    formula: str
    source: str
    codes: Mapping[str, Code]
    identity: Callable[[Symbols, int], Iterable[tuple[Any, Any]]]
    candidates: Callable[[Sites, SoFar], Iterable[S]]
    guard: Callable[[S, SoFar], Iterator[Objection]]
    cost: Callable[[S], Cost]
    rewrite: Callable[[S, Edit], None]
    example: Example
    counterexamples: tuple[Example, ...] = field(default=())
    default: bool = True
    makes_rms_norms: bool = False
    exported: bool = True
    for_kernels: bool = False
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    summary: str = ""
    mistake: tuple[str, Callable[..., Any]] | None = None

    def refusals(self, site: S, so_far: SoFar) -> tuple[Refusal, ...]:
        return tuple(self.refuse(code, detail, nodes) for code, detail, nodes in self.guard(site, so_far))

    def refuse(self, code: str, detail: str, nodes: tuple[Node, ...] = ()) -> Refusal:
        known = self.codes[code]
        text = f"{known.meaning}: {detail}" if detail else known.meaning
        return Refusal(self.name, code, text, known.hint, nodes, known.meaning)
