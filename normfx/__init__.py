"""normfx: a torch.compile backend that turns LayerNorm into RMSNorm, and folds what norms multiply into weights.

torch.compile(model, backend="normfx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normfx import checkout
from normfx.errors import ConvertError, ExportError, NormfxError, NormfxWarning, OptionError, StageError, VerifyError

if TYPE_CHECKING:
    from normfx.allocator import release_memory
    from normfx.backend import compiled_report
    from normfx.converting import convert
    from normfx.explaining import explain
    from normfx.export import rewrite
    from normfx.options import Options
    from normfx.report import Report
    from normfx.weights.store import refold

checkout.register()

__version__ = "0.1.0"

__all__ = [
    "ConvertError",
    "ExportError",
    "NormfxError",
    "NormfxWarning",
    "OptionError",
    "Options",
    "Report",
    "StageError",
    "VerifyError",
    "compiled_report",
    "convert",
    "explain",
    "refold",
    "release_memory",
    "rewrite",
]

_LAZY = {
    "Options": "normfx.options",
    "Report": "normfx.report",
    "compiled_report": "normfx.backend",
    "convert": "normfx.converting",
    "explain": "normfx.explaining",
    "refold": "normfx.weights.store",
    "release_memory": "normfx.allocator",
    "rewrite": "normfx.export",
}
"""What is imported when it is first asked for: Dynamo, Inductor and sympy take seconds. No module has one of these
names: Python would put it in the place of the function."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'normfx' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
