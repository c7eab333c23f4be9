"""normfx.rewrite: the same rules on a torch.export program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node

from normfx.backend import parse, transform_canonical
from normfx.capture.trace import capture_exported
from normfx.compat.modules import with_graph
from normfx.errors import ExportError
from normfx.logs import say
from normfx.lower.inductor import inline_canonical_ops
from normfx.rules import RULES


def rewrite(exported_program: ExportedProgram, options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """An ExportedProgram computing the same function with the rules applied; the argument is left as it is.

    Folds are live: expressions on the program's own parameters, whose names and state dict do not change. The result
    holds ATen ops alone, so it can be validated, saved, loaded and compiled without normfx.

    Raises ExportError for anything but an ExportedProgram, OptionError for bad options.
    """
    if not isinstance(exported_program, ExportedProgram):
        raise ExportError(
            f"normfx.rewrite takes a torch.export.ExportedProgram, not {type(exported_program).__name__}; "
            "export the model first: torch.export.export(model, args)"
        )
    captured = capture_exported(exported_program)
    settings = parse(options)
    kept = tuple(rule.name for rule in RULES if rule.exported and rule.name in settings.rules)
    changed, report = transform_canonical(captured, replace(settings, rules=kept, fold="live", lowering="inductor"))
    say(report, settings.debug)
    if not changed:
        return exported_program
    rewritten = captured.graph_module
    inline_canonical_ops(rewritten)
    return with_graph(exported_program, rewritten, _renamed(exported_program.graph_signature, rewritten.graph))


def _renamed(signature: ExportGraphSignature, graph: Graph) -> ExportGraphSignature:
    """The signature with the names that the graph's outputs have now; their order and meaning do not change."""
    renamed = copy.deepcopy(signature)
    for spec, node in zip(renamed.output_specs, graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if isinstance(node, Node):
            spec.arg.name = node.name
    return renamed
