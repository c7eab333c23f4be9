"""normfx: a torch.compile backend that turns LayerNorm into RMSNorm, and folds what norms multiply into weights.

torch.compile(model, backend="normfx")
"""

from normfx.backend import compiled_report
from normfx.errors import ExportError, NormfxError, NormfxWarning, OptionError, StageError, VerifyError
from normfx.explain import explain
from normfx.export import rewrite
from normfx.options import Options
from normfx.report import Report
from normfx.weights.store import refold

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
