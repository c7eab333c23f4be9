"""What a report is made of: frozen records of norms, refusals, folded weights, graphs and graph breaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from normfx.ir.sites import Norm
from normfx.rules import RMS_NORM_RULES


@dataclass(frozen=True)
class RefusalReport:
    """Why a rule left a norm alone; `nodes` are graph values with the module they belong to.

    meaning: what the code means, without the values that were found (`detail` has both)
    source:  the line of the user's code that computes the first of the nodes ("" where it is not known)
    """

    rule: str
    code: str
    detail: str
    hint: str
    nodes: tuple[str, ...]
    meaning: str = ""
    source: str = ""


@dataclass(frozen=True)
class CostReport:
    """What a rule's decision is predicted to change per call: bytes before and after, as text.

    norms: how many norms the decision covers
    """

    rule: str
    before: str
    after: str
    norms: int = 1


@dataclass(frozen=True)
class SiteReport:
    """One norm: its module path, kind, the rules applied in order, the refusals, and where it is written.

    lowering: on a CUDA device, and everywhere under lowering="triton", "triton: ", the kernel and the bytes it must
              move, or "inductor: " and why there is no kernel, or why Inductor is ahead of it; else "two-pass" where a
              norm that stays is spelled out, "inductor" where it is not
    shares:   an earlier norm of the same value whose result is also this one's ("" if there is none)
    readers:  what reads the norm, "h.0.attn.c_attn (linear)"
    costs:    of the decisions that were applied here
    before:   lines of the graph's text that compute the norm, counted from 0
    after:    the same, of the text after the rewrite
    """

    name: str
    kind: str
    rules: tuple[str, ...]
    refusals: tuple[RefusalReport, ...]
    source: str
    lowering: str = "inductor"
    shares: str = ""
    readers: tuple[str, ...] = ()
    costs: tuple[CostReport, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def to_rms_norm(self) -> bool:
        """Whether a LayerNorm became an RMSNorm here."""
        return self.kind == "LayerNorm" and not RMS_NORM_RULES.isdisjoint(self.rules)


@dataclass(frozen=True)
class StepReport:
    """A step of a residual stream: a value that is written into it, a sum that makes its next segment, or a norm.

    kind:    "writer", "sum" or "norm"
    stream:  the stream's number; norms between two segments of one stream (post-norm) are steps of it, too
    name:    module path or name of what computes the value
    op:      the operator, "linear"
    type:    "f32[2, 16, 32]"
    line:    line of the graph's text before the rewrite, counted from 0; -1 where it has none
    site:    for a norm, its place among the sites; else -1
    inline:  for a norm, whether its result is part of the stream again
    centred: whether the value is stored with mean zero after the rewrite
    source:  the line of the user's code
    """

    kind: str
    stream: int
    name: str
    op: str = ""
    type: str = ""
    line: int = -1
    site: int = -1
    inline: bool = False
    centred: bool = False
    source: str = ""


@dataclass(frozen=True)
class Picture:
    """What a picture of a graph is drawn from: its streams, and for each norm readers, costs and lines of the text."""

    steps: tuple[StepReport, ...] = ()
    readers: tuple[tuple[str, ...], ...] = ()
    costs: tuple[tuple[CostReport, ...], ...] = ()
    lines: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class FoldReport:
    """What became of the folded weights of a compiled graph.

    variants:       those that exist: "live" or "cached", and "frozen"
    bytes:          of the kept values of one parameter set
    frozen_bytes:   of the constants of the frozen variant, while there is one; kept values are then not there
    parameter_sets: sets of parameters the graph was called with whose folds are kept
    refreshes:      kept values computed so far, the first time included
    freezes:        times the frozen variant was built
    budget:         bytes that all kept, packed and frozen weights of the process might take on the device when the
                    graph was compiled (options={'fold_memory': …}, and half of what the machine had left)
    left:           weights that did not fit, by name, with the bytes that keeping them takes: they are multiplied by as
                    they are, or folded in the graph
    unfrozen:       weights that did not fit as constants of the frozen variant
    unkept:         calls with further parameter sets that did not fit: their values were computed in the call
    """

    variants: tuple[str, ...] = ()
    bytes: int = 0
    frozen_bytes: int = 0
    parameter_sets: int = 0
    refreshes: int = 0
    freezes: int = 0
    budget: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    unfrozen: Mapping[str, int] = field(default_factory=dict)
    unkept: int = 0

    def __str__(self) -> str:
        size = f"{_mib(self.bytes)} of folded weights, {self.parameter_sets} parameter sets"
        said = f"{' + '.join(self.variants)}: {size}, {self.refreshes} values computed, frozen {self.freezes} times"
        if self.frozen_bytes:
            said += f" ({_mib(self.frozen_bytes)} of constants)"
        if self.budget or self.left:
            said += f"; fold_memory {_mib(self.budget)}"
        for which, verb in ((self.left, "kept"), (self.unfrozen, "frozen")):
            if which:
                weights = "1 weight" if len(which) == 1 else f"{len(which)} weights"
                said += f"; {weights} not {verb}, for {_mib(sum(which.values()))} more did not fit"
        return said + (f"; {self.unkept} calls with parameters that did not fit" if self.unkept else "")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class FailureReport:
    """A stage of normfx that failed, after which the untouched graph was compiled; `error` is its class and text."""

    stage: str
    error: str


@dataclass(frozen=True)
class GraphBreak:
    """A place at which Dynamo ended a graph: the line of the user's code, the cause, and Dynamo's hint, if any."""

    place: str
    cause: str
    hint: str = ""


@dataclass(frozen=True)
class GraphReport:
    """One captured graph. before, after: printer text; kernels: name → generated source; seconds: per stage.

    weights:    None where nothing was compiled
    bytes:      by rule, predicted for a call: what passes over the activations it touches and over live weights read
                and write, before and after, as text with the graph's symbolic sizes
    saved:      by rule, the difference of the two at the sizes of the call that was captured
    composed:   weights computed from parameters alone, of kind "Weight", pairs of linear layers, of kind "Linear", and
                sums of branches that read one value, of kind "Branches"
    function:   name and place of the function that Dynamo traced ("" where it is not known)
    compile_id: Dynamo's: "2/1" is the second compilation of the third function
    gradients:  whether gradients of parameters are recorded
    failure:    the stage that failed, if one did; then nothing was applied
    stored_sums: sums of residual streams that Inductor is told to store once; they are not in `after`
    largest_result: bytes of the largest tensor that is computed and returned on the CPU, at the sizes of the call
    steps:      the residual streams, in the order of the graph before the rewrite
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
    saved: Mapping[str, int] = field(default_factory=dict)
    function: str = ""
    compile_id: str = ""
    gradients: bool = False
    failure: FailureReport | None = None
    stored_sums: int = 0
    largest_result: int = 0
    steps: tuple[StepReport, ...] = ()

    def with_picture(self, picture: Picture, after: Iterable[Iterable[int]]) -> GraphReport:
        """The same, with residual streams, and with readers, costs and lines of each site, also of the text after."""
        own = zip(self.sites, picture.readers, picture.costs, picture.lines, after, strict=True)
        sites = (
            replace(site, readers=readers, costs=costs, before=before, after=tuple(later))
            for site, readers, costs, before, later in own
        )
        return replace(self, sites=tuple(sites), steps=picture.steps)

    def with_lowering(self, lowering: Iterable[str | None], kernels: Mapping[str, str]) -> GraphReport:
        """The same, with what each site runs on where that is known, and the sources of kernels."""
        sites = (replace(site, lowering=own or site.lowering) for site, own in zip(self.sites, lowering, strict=True))
        return replace(self, sites=tuple(sites), kernels=dict(kernels))

    def with_shared(self, shared: Iterable[Norm | None]) -> GraphReport:
        """The same, with the norm that each site shares its result with."""
        pairs = zip(self.sites, shared, strict=True)
        return replace(self, sites=tuple(replace(site, shares=norm.name if norm else "") for site, norm in pairs))
