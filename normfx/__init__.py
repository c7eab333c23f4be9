"""normfx: a torch.compile backend that turns LayerNorm into RMSNorm, and folds what norms multiply into weights.

torch.compile(model, backend="normfx")
"""

from normfx import checkout as _checkout  # before everything that imports the kernels
from normfx.backend import compiled_report
from normfx.backend import normfx as _backend
from normfx.errors import ExportError, NormfxError, NormfxWarning, OptionError, StageError, VerifyError
from normfx.explain import explain
from normfx.export import rewrite
from normfx.options import Options
from normfx.report import Report
from normfx.weights.store import refold

_checkout.register(_backend)

__version__ = "0.1.0"

__all__ = [
    "ExportError",
    "NormfxError",
    "NormfxWarning",
    "OptionError",
    "Options",
    "Report",
    "StageError",
    "VerifyError",
    "compiled_report",
    "explain",
    "refold",
    "rewrite",
]
