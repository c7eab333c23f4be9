"""normfx.rewrite: the same rules on a torch.export program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from normfx.backend import transform_canonical
from normfx.capture import capture_exported
from normfx.errors import ExportError
from normfx.lower.inductor import inline_canonical_ops
from normfx.options import Options


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
    rewritten, _ = transform_canonical(captured, Options.parse(options))
    if rewritten is None:
        return exported_program
    inline_canonical_ops(rewritten)
    return exported_program._update(rewritten, exported_program.graph_signature)
