"""The pipeline behind torch.compile(..., backend="normfx"): one call per stage, no logic of its own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node

from normfx.capture import Captured, capture
from normfx.compression import stored
from normfx.dynamo import compile_id, explained, function, handed_on
from normfx.edit import Rewritten, rewrite
from normfx.environment import environment
from normfx.errors import NormfxError, NormfxWarning, StageError, crash_note, stage_warning
from normfx.ir import ops
from normfx.ir.aliasing import mutated
from normfx.ir.cleanup import drop_dead_code
from normfx.ir.functionalize import functionalize_local
from normfx.ir.fusion import centres_output
from normfx.ir.names import module_path, source_line
from normfx.ir.printer import print_lines
from normfx.ir.recompute import keep_folds
from normfx.ir.simplify import drop_identities, read_parts
from normfx.ir.verify import Checked, verify
from normfx.logs import say
from normfx.lower import choice
from normfx.lower.folded import Compiled, Folding, compile_folded, hoist, is_frozen
from normfx.lower.inductor import check_options, compile_graph, inductor_options
from normfx.lower.native import use_native_norms
from normfx.lower.packed import PACK, pack_linears
from normfx.lower.products import with_products
from normfx.lower.stored import store_sums
from normfx.lower.triton import Lowered, lower_norms
from normfx.lower.verified import verified
from normfx.options import Options, warn_once
from normfx.picture import draw, places
from normfx.plan import make_plan
from normfx.recognize import recognize
from normfx.report import FailureReport, FoldReport, GraphReport, Report, graph_report
from normfx.specialize import specialize_epsilons
from normfx.weights.kept import keepable, kept_values, records_gradients
from normfx.weights.live import live_folds
from normfx.weights.native import start_native_library

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
    freezes = is_frozen(settings.fold, patches)
    if settings.fold != "live":
        start_native_library()
    ready = transform(gm, example_inputs, settings, freezes)
    changed = ready.graph_module is not gm
    with explained(crash_note("compile", changed)):
        if changed:
            constants = ready.weights if freezes else None
            compiled = compile_folded(
                ready.graph_module, ready.folding, example_inputs, constants, patches, settings.strict
            )
        else:
            compiled = Compiled(compile_graph(gm, example_inputs, patches))
    compiled.note = crash_note("run", changed)
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
    graphs = tuple(replace(r, weights=FoldReport(**folding)) for r, folding in reports)
    return Report(graphs, note=note, environment=environment())


@dataclass(frozen=True, eq=False)
class Transformed:
    """A graph to compile, rewritten or as it came.

    folding: its kept folds, which are its last inputs
    weights: its parameters, buffers and constants
    """

    graph_module: GraphModule
    report: GraphReport
    folding: Folding | None = None
    weights: frozenset[Node] = frozenset()


def transform(gm: GraphModule, example_inputs: Sequence[Any], settings: Options, freezes: bool = False) -> Transformed:
    """Dynamo graph → rewritten canonical graph, or the graph itself when nothing applies or a stage failed.

    A graph on which no rule applies is its canonical graph, too, where sums of a residual stream are to be stored.

    freezes: the canonical graph is wanted even if no rule applies
    """
    stages = _Stages()
    specialize_epsilons(gm)
    source, number = function(gm), compile_id()
    try:
        captured = stages.run("capture", capture, gm, example_inputs)
        changed, report = transform_canonical(captured, settings, stages, _values(captured, example_inputs))
        used, folding = changed or freezes or bool(_forcing), None
        if used and settings.fold != "live":
            folding = stages.run("fold", _keep_folds, captured, settings, not freezes)
        stored_sums = stages.run("store", store_sums, captured.graph_module) if report.sites and settings.rules else 0
    except Exception as error:
        if settings.strict:
            raise StageError(stages.current, error) from error
        warnings.warn(stage_warning(stages.current, error), NormfxWarning, stacklevel=2)
        failure = FailureReport(stages.current, f"{type(error).__name__}: {error}")
        report = GraphReport((), failure=failure, function=source, compile_id=number)
        say(report, settings.debug)
        return Transformed(gm, report)
    gradients = bool(captured.trained) and records_gradients(captured.graph_module.graph)
    report = replace(report, function=source, compile_id=number, gradients=gradients, seconds=dict(stages.seconds))
    report = replace(report, stored_sums=stored_sums)
    say(report, settings.debug)
    if used or stored_sums:
        return Transformed(captured.graph_module, report, folding, captured.weights)
    return Transformed(gm, report)


def transform_canonical(
    captured: Captured,
    settings: Options,
    stages: _Stages | None = None,
    values: Mapping[Node, torch.Tensor] | None = None,
) -> tuple[bool, GraphReport]:
    """Rewrite a canonical graph in place. Returns whether anything was applied, and the report.

    values: of parameters, as far as they are known. They decide between forms that are all exact
    """
    stages = stages or _Stages()
    canonical, graph = captured.graph_module, captured.graph_module.graph
    weights = captured.weights
    checked: Checked = {}
    names = {n: s.name for n, s in captured.sources.items()}
    live = None if settings.fold == "live" else weights - _keepable(captured, settings)
    stages.run("functionalize", functionalize_local, canonical)
    stages.run("simplify", _simplify, canonical)
    _check(settings, canonical, "capture", checked)
    sites = stages.run("recognize", recognize, graph, weights, mutated(graph), module_path, source_line, live)
    by_inductor, by_kernels = settings.lowering == "inductor", settings.lowering == "triton"
    plan = stages.run(
        "plan", make_plan, sites, settings.rules, not by_inductor, by_kernels or (choice.is_open() and not by_inductor)
    )
    before, lines = print_lines(graph, names, weights, module_path)
    picture = stages.run("picture", draw, graph, sites, plan, names, lines)
    done, lowered = Rewritten(), Lowered()
    if plan.changes:
        store = partial(stored, basis=settings.crms_basis, width=settings.crms_width, values=values or {})
        done = stages.run("rewrite", rewrite, canonical, plan, store)
        keep_folds(graph, weights)
        _check(settings, canonical, "rewrite", checked)
    if plan.changes:
        lowered = stages.run("lower", _lower, canonical, settings.lowering)
        _check(settings, canonical, "lower", checked)
    after, later = print_lines(graph, names, weights, module_path) if plan.changes else (before, lines)
    report = graph_report(plan, before, after, module_path, _count_folds(canonical, weights), stages.seconds, names)
    report = report.with_lowering([lowered.of.get(done.written.get(norm)) for norm in plan.norms], lowered.kernels)
    report = report.with_shared([done.shared.get(norm) for norm in plan.norms])
    report = report.with_picture(picture, places(plan.norms, done, later, after))
    return plan.changes, report


def _simplify(gm: GraphModule) -> None:
    drop_identities(gm)
    if read_parts(gm, mutated(gm.graph)):
        drop_dead_code(gm.graph)


def _lower(gm: GraphModule, lowering: str) -> Lowered:
    lowered = Lowered() if lowering == "inductor" else lower_norms(gm, lowering == "triton")
    use_native_norms(gm)
    return lowered


def _values(captured: Captured, example_inputs: Sequence[Any]) -> dict[Node, torch.Tensor]:
    """Real values of parameters, buffers and constants."""
    inputs = captured.graph_module.graph.find_nodes(op="placeholder")
    pairs = zip(inputs, example_inputs, strict=True)
    return {n: x for n, x in pairs if n in captured.weights and type(x) in (torch.Tensor, torch.nn.Parameter)}


def _keepable(captured: Captured, settings: Options) -> frozenset[Node]:
    graph = captured.graph_module.graph
    return keepable(graph, captured.weights, captured.trained, everywhere=settings.fold != "auto")


def _keep_folds(captured: Captured, settings: Options, packs: bool) -> Folding | None:
    """Take the folds out of the graph. packs: and the weights of its linear layers, where packed ones are faster."""
    gm, free = captured.graph_module, _keepable(captured, settings)
    if packs:
        pack_linears(gm, free)
    folding = hoist(gm, kept_values(gm.graph, free))
    left = [node.name for node in gm.graph.nodes if node.target is PACK]
    if left:
        raise NormfxError(f"normfx: packed weights that cannot be kept: {', '.join(left)}; please report this graph")
    return folding


def _count_folds(gm: GraphModule, weights: frozenset[Any]) -> tuple[int, int]:
    folds = live_folds(gm.graph, [n for n in gm.graph.nodes if n in weights])
    centrings = [n for n in gm.graph.nodes if n.target in (ops.CENTER, ops.COMPRESS) and n not in folds]
    return len(folds), len(centrings) + sum(map(centres_output, gm.graph.nodes))


def _check(settings: Options, gm: GraphModule, stage: str, checked: Checked) -> None:
    if settings.check:
        verify(gm, stage, checked)


class _Stages:
    """Runs stages by name and keeps their seconds; `current` is the one that failed, if one did."""

    def __init__(self) -> None:
        self.current = "capture"
        self.seconds: dict[str, float] = {}

    def run(self, name: str, stage: Callable[..., Any], *args: Any) -> Any:
        self.current = name
        begin = time.perf_counter()
        result = stage(*args)
        self.seconds[name] = time.perf_counter() - begin
        return result
