"""normfx.rewrite: the same rules on a torch.export program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node

from normfx.backend import parse, transform_canonical
from normfx.capture.simplify import drop_identities
from normfx.capture.trace import Captured, capture_exported
from normfx.compat.modules import with_graph
from normfx.converting.freezing import freeze
from normfx.environment import environment
from normfx.errors import ExportError, OptionError
from normfx.graph.aliasing import mutated
from normfx.logs import say
from normfx.lower.inductor import inline_canonical_ops
from normfx.lower.native import write_as_aten
from normfx.options import Options
from normfx.report import GraphReport, Report


@overload
def rewrite(
    exported_program: ExportedProgram, options: Mapping[str, Any] | None = None, *, report: Literal[False] = False
) -> ExportedProgram: ...


@overload
def rewrite(
    exported_program: ExportedProgram, options: Mapping[str, Any] | None = None, *, report: Literal[True]
) -> tuple[ExportedProgram, Report]: ...


def rewrite(
    exported_program: ExportedProgram, options: Mapping[str, Any] | None = None, *, report: bool = False
) -> ExportedProgram | tuple[ExportedProgram, Report]:
    """An ExportedProgram computing the same function with the rules applied; the argument is left as it is.

    options: those of the backend. By default folds are expressions on the program's own parameters, whose names and
             state dict do not change, where computing them in each run costs less than they save; with
             `{"fold": "live"}` wherever they are exact. With `{"fold": "frozen"}` they are computed once and become
             buffers of the program, in the places of parameters that nothing reads any more: for deployment
    report:  also return a Report, which says what became of each norm

    The result holds ATen ops alone, norms as `aten.rms_norm` and `aten.layer_norm` where these compute the same, so it
    can be validated, saved, loaded, compiled and exported to ONNX without normfx.

    Raises ExportError for anything but an ExportedProgram, and for a frozen one without real weights; OptionError for
    bad options.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise ExportError(
            f"normfx.rewrite takes a torch.export.ExportedProgram, not {type(exported_program).__name__}; "
            "export the model first: torch.export.export(model, args)"
        )
    settings = _settings(options)
    captured = capture_exported(exported_program)
    if settings.fold == "frozen":
        captured = _without_changing(exported_program, captured)
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.fold != "frozen"):
        changed, found = transform_canonical(captured, settings)
    say(found, settings.debug)
    rewritten = _written(exported_program, captured, settings) if changed else exported_program
    return (rewritten, _report(found)) if report else rewritten


def _settings(options: Mapping[str, Any] | None) -> Options:
    if (options or {}).get("fold") == "cached":
        raise OptionError(
            "normfx: fold='cached' keeps values while a process runs, which a program cannot do; give normfx.rewrite "
            "fold='live' or fold='frozen'"
        )
    settings = parse(options)
    fold = settings.fold if settings.fold in ("frozen", "live") else "auto"
    return replace(settings, fold=fold, lowering="inductor")


def _without_changing(program: ExportedProgram, captured: Captured) -> Captured:
    """The graph, in which what the program itself writes is an input: its value is another one in the next call."""
    written = set(program.graph_signature.buffers_to_mutate.values())
    writes = mutated(captured.graph_module.graph)
    sources = {
        node: replace(source, kind="input") if node in writes or source.name in written else source
        for node, source in captured.sources.items()
    }
    return replace(captured, sources=sources)


def _written(program: ExportedProgram, captured: Captured, settings: Options) -> ExportedProgram:
    """The program with the rewritten graph, in ATen."""
    gm, signature, state = captured.graph_module, copy.deepcopy(program.graph_signature), None
    if settings.fold == "frozen":
        signature, state = freeze(program, captured, signature)
    write_as_aten(gm)
    inline_canonical_ops(gm)
    drop_identities(gm)
    _rename_outputs(signature, gm.graph)
    return with_graph(program, gm, signature, state)


def _rename_outputs(signature: ExportGraphSignature, graph: Graph) -> None:
    """Give outputs the names that they have in the graph now; their order and meaning do not change."""
    outputs: Any = graph.output_node().args[0]
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        if isinstance(node, Node):
            spec.arg.name = node.name


def _report(found: GraphReport) -> Report:
    return Report((found,), environment=environment())
