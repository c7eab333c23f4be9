"""The backend of torch.compile: the list of stages that a graph goes through (PIPELINE), and reports of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node

from normfx.agreement import together
from normfx.allocator import advice, keep_freed_memory, memory_line, raise_thresholds
from normfx.apply import apply_plan, count_folds
from normfx.capture.functionalize import functionalize_local
from normfx.capture.simplify import simplify
from normfx.capture.specialize import specialize_epsilons
from normfx.capture.trace import Captured, capture
from normfx.checks.verify import verify
from normfx.compat.dynamo import compile_id
from normfx.dynamo import explained, function, handed_on
from normfx.environment import environment
from normfx.errors import NormfxError, NormfxWarning, StageError, crash_note, stage_warning
from normfx.graph.facts import facts_of
from normfx.graph.names import module_path, source_line
from normfx.graph.recompute import keep_folds
from normfx.logs import say
from normfx.lower import choice
from normfx.lower.affordable import beyond, rooms
from normfx.lower.attention import start_attention, with_attention
from normfx.lower.folded import Compiled, compile_folded, is_frozen
from normfx.lower.hoist import Folding
from normfx.lower.inductor import check_options, compile_graph, inductor_options
from normfx.lower.native import use_native_norms
from normfx.lower.outside import keep_folds_outside, keepable_weights
from normfx.lower.products import plain_rows, with_products
from normfx.lower.stored import store_sums
from normfx.lower.triton import lower_norms
from normfx.lower.verified import verified
from normfx.options import Options, warn_once
from normfx.picture import draw, places
from normfx.plan import make_plan
from normfx.recognize import recognize
from normfx.report import FailureReport, FoldReport, GraphReport, Report, graph_report, largest_result
from normfx.weights.kept import records_gradients
from normfx.weights.native import start_native_library
from normfx.work import Work

_listeners: list[Callable[[GraphReport], None]] = []

_forcing: list[None] = []


@contextmanager
def listening(listener: Callable[[GraphReport], None]) -> Iterator[None]:
    """Call `listener` with the report of every graph that the backend compiles meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def forced() -> Iterator[None]:
    """Hand on the canonical graph meanwhile even where no rule applies: a test of capture alone, on any program."""
    _forcing.append(None)
    try:
        yield
    finally:
        _forcing.pop()


def normfx(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend: rewrite the norms of a Dynamo graph and compile it with Inductor.

    Raises OptionError for bad options. Any other failure of a stage of normfx gives one NormfxWarning and the untouched
    graph is compiled, unless options["strict"] is set; Inductor's own exceptions pass through, with a note.
    """
    try:
        settings = parse(options, mode)
        patches = with_products(inductor_options(settings.mode, settings.inductor), settings.products)
        patches = with_attention(patches, settings.attention)
        if settings.lowering == "triton" and not torch.cuda.is_available():
            warn_once(
                "normfx: lowering='triton' has no effect here: the generated kernels run on CUDA devices, and torch "
                "finds none. Inductor runs the norms."
            )
        return _compile(gm, example_inputs, settings, patches)
    except NormfxError as error:
        raise handed_on(error) from error


def _compile(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Options, patches: Mapping[str, Any]
) -> Callable[..., Any]:
    if settings.malloc == "keep":
        keep_freed_memory()
    else:
        raise_thresholds()
    freezes = is_frozen(settings.fold, patches)
    if settings.fold != "live":
        start_native_library()
    if settings.attention != "aten":
        start_attention(gm.graph, example_inputs)
    ready, why = together(gm, repr(settings), lambda joined: transform(gm, example_inputs, settings, freezes, joined))
    if why:
        warn_once(f"normfx: what several processes compute together is left as it is: {why}")
    changed = ready.graph_module is not gm
    with explained(crash_note("compile", changed)):
        if changed:
            constants, room = ready.weights if freezes else None, rooms(settings.fold_memory)
            own, folding, weights = ready.graph_module, ready.folding, ready.weights
            compiled = compile_folded(own, folding, example_inputs, constants, patches, settings.strict, room, weights)
        else:
            compiled = Compiled(compile_graph(gm, example_inputs, patches))
    compiled.note, compiled.memory = crash_note("run", changed), ready.memory
    _compiled[compiled] = ready.report
    for listener in _listeners:
        listener(ready.report)
    return verified(compiled, gm) if settings.verify and changed else compiled


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """The options as a value. Raises OptionError, also for an option of Inductor's that is not given to Inductor."""
    check_options(options or {})
    return Options.parse(options, mode)


_compiled: WeakKeyDictionary[Compiled, GraphReport] = WeakKeyDictionary()

vars(normfx)["reset"] = _compiled.clear  # torch._dynamo.reset() calls it (torch 2.11 to 2.14)


def compiled_report() -> Report:
    """The report of every graph that the backend compiled and that is still in use, folded weights as of now.

    `compile_id` tells the graphs of one function from those of another. torch._dynamo.reset() empties it.
    """
    reports = [(report, compiled.folding()) for compiled, report in _compiled.items()]
    note = "" if reports else "Nothing is compiled with normfx now; torch._dynamo.reset() empties this report."
    note = note or memory_line() or advice(max(report.largest_result for report, _ in reports))
    graphs = tuple(replace(r, weights=FoldReport(**folding)) for r, folding in reports)
    return Report(graphs, note=note, environment=environment())


@dataclass(frozen=True, eq=False)
class Transformed:
    """A graph to compile, rewritten or as it came.

    folding: its kept folds, which are its last inputs
    weights: its parameters, buffers and constants
    memory:  the budget of kept weights, and what did not fit, as in records.FoldReport
    """

    graph_module: GraphModule
    report: GraphReport
    folding: Folding | None = None
    weights: frozenset[Node] = frozenset()
    memory: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decided(self) -> str:
        """What was done to each norm, for other processes to compare."""
        return str([site.rules for site in self.report.sites])


@dataclass(frozen=True)
class Stage:
    """A step on a graph. when: it is left out otherwise; check: the graph's invariants are checked after it, under this
    name; exported: it is part of normfx.rewrite too."""

    name: str
    run: Callable[[Work], None]
    when: Callable[[Work], bool] = lambda work: True
    check: str = ""
    exported: bool = True


def _capture(work: Work) -> None:
    """Dynamo's graph → the canonical one, in ATen before autograd and autocast."""
    assert work.original is not None
    work.captured = capture(work.original, work.example_inputs, work.joined)
    work.values = work.captured.values(work.example_inputs)


def _functionalize(work: Work) -> None:
    """In-place writes to values that nothing else sees become out-of-place."""
    functionalize_local(work.canonical)


def _simplify(work: Work) -> None:
    """Ops that do nothing go, and parts of what was joined are read directly."""
    simplify(work.canonical, work.captured.weights, not work.parameters_only)


def _recognize(work: Work) -> None:
    """The norms, streams and readers of the graph."""
    weights = work.captured.weights
    live = None
    if work.settings.fold != "live":
        keeps = frozenset() if work.computes_folds else keepable_weights(work.captured, work.settings)
        if work.original is not None:  # else they are written into a program or a model, which has room for them
            work.excess = beyond(work.canonical.graph, keeps, rooms(work.settings.fold_memory), work.values)
        live = (weights - keeps) | work.excess
    facts = facts_of(work.canonical.graph, weights, live, work.adds_apart)
    work.sites = recognize(facts, module_path, source_line, work.parameters_only)
    if work.parameters_only:
        streams = tuple(stream.of_parameters() for stream in work.sites.streams)
        readers = {norm: found.of_parameters() for norm, found in work.sites.readers.items()}
        work.sites = replace(work.sites, streams=streams, readers=readers)


def _decide(work: Work) -> None:
    """Which rule is applied where, and why not elsewhere."""
    option = work.settings.lowering
    says = choice.spells(option), choice.may_run(option)
    work.plan = make_plan(work.sites, work.settings.rules, *says, work.settings.rule_options, work.original is None)
    work.before, work.lines = work.text()


def _draw(work: Work) -> None:
    """The streams, as the report's page shows them."""
    work.picture = draw(work.canonical.graph, work.sites, work.plan, work.names, work.lines)


def _rewrite(work: Work) -> None:
    """The plan, carried out."""
    work.done = apply_plan(work.canonical, work.plan, work.values, work.settings.rule_options, not work.parameters_only)
    keep_folds(work.canonical.graph, work.captured.weights)


def _lower(work: Work) -> None:
    """Norms go to generated kernels, to ATen, or stay as they are for Inductor."""
    option = work.settings.lowering
    if option != "inductor":
        work.lowered = lower_norms(work.canonical, option == "triton", work.captured.trained)
    use_native_norms(work.canonical)


def _tell(work: Work) -> None:
    """The report of what was done."""
    weights, plan, done = work.captured.weights, work.plan, work.done
    after, lines = work.text() if plan.changes else (work.before, work.lines)
    counts = count_folds(work.canonical.graph, weights)
    report = graph_report(plan, work.before, after, module_path, counts, work.seconds, work.names, work.excess)
    on = [work.lowered.of.get(done.written.get(norm)) for norm in plan.norms]
    report = report.with_lowering(on, work.lowered.kernels)
    report = report.with_shared([done.shared.get(norm) for norm in plan.norms])
    report = replace(report, largest_result=largest_result(work.canonical.graph))
    work.report = report.with_picture(work.picture, places(plan.norms, done, lines, after))


def _fold(work: Work) -> None:
    """Folds of parameters that need no gradient leave the graph: their values are kept."""
    settings = work.settings
    plain_row = plain_rows(inductor_options(settings.mode, settings.inductor), settings.products)
    widens = settings.products == "auto"
    work.folding, work.memory = keep_folds_outside(
        work.captured, settings, not work.freezes, widens, work.values, plain_row
    )


def _store(work: Work) -> None:
    """Sums of residual streams are stored once, where that moves fewer bytes."""
    work.stored_sums = store_sums(work.canonical)


PIPELINE = (
    Stage("capture", _capture, exported=False),
    Stage("functionalize", _functionalize),
    Stage("simplify", _simplify, check="capture"),
    Stage("recognize", _recognize),
    Stage("plan", _decide),
    Stage("picture", _draw),
    Stage("rewrite", _rewrite, when=lambda work: work.plan.changes, check="rewrite"),
    Stage("lower", _lower, when=lambda work: work.plan.changes, check="lower"),
    Stage("report", _tell),
    Stage("fold", _fold, when=lambda work: work.used and work.settings.fold != "live", exported=False),
    Stage("store", _store, when=lambda work: bool(work.report.sites and work.settings.rules), exported=False),
)
"""What becomes of a graph, stage after stage. What remains is compiled: by Inductor (lower/inductor.py), and with kept
folds by lower/folded.py."""


def _run(work: Work) -> None:
    for stage in PIPELINE:
        if (work.original is None and not stage.exported) or not stage.when(work):
            continue
        work.stage = stage.name
        begin = time.perf_counter()
        stage.run(work)
        work.seconds[stage.name] = time.perf_counter() - begin
        if stage.check and work.settings.check:
            verify(work.canonical, stage.check, work.checked)


def transform(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Options, freezes: bool = False, joined: bool = True
) -> Transformed:
    """Dynamo graph → rewritten canonical graph, or the graph itself when nothing applies or a stage failed.

    A graph on which no rule applies is its canonical graph, too, where sums of a residual stream are to be stored.
    freezes: the canonical graph is wanted even if no rule applies; joined: other processes do the same
    """
    work = Work(settings, freezes, gm, example_inputs, joined, forced=bool(_forcing))
    specialize_epsilons(gm)
    source, number = function(gm), compile_id()
    try:
        _run(work)
    except Exception as error:
        if settings.strict:
            raise StageError(work.stage, error) from error
        warnings.warn(stage_warning(work.stage, error), NormfxWarning, stacklevel=2)
        failure = FailureReport(work.stage, f"{type(error).__name__}: {error}")
        report = GraphReport((), failure=failure, function=source, compile_id=number)
        say(report, settings.debug)
        return Transformed(gm, report)
    gradients = bool(work.captured.trained) and records_gradients(work.canonical.graph)
    report = replace(work.report, function=source, compile_id=number, gradients=gradients, seconds=work.seconds)
    report = replace(report, stored_sums=work.stored_sums)
    say(report, settings.debug)
    if work.used or work.stored_sums:
        return Transformed(work.canonical, report, work.folding, work.captured.weights, work.memory)
    return Transformed(gm, report)


def transform_canonical(
    captured: Captured, settings: Options, parameters_only: bool = False
) -> tuple[bool, GraphReport]:
    """Rewrite a canonical graph in place. Returns whether anything was applied, and the report."""
    work = Work(settings, parameters_only=parameters_only, forced=bool(_forcing))
    work.captured = captured
    _run(work)
    return work.plan.changes, work.report
