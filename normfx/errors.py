"""Every error and warning a user of normfx can meet: what happened, where, what to do."""

from __future__ import annotations

from collections.abc import Iterable

REPORT_HINT = "Please report it with the output of NORMFX_DEBUG=2, or set options={'strict': True} to raise here."


class NormfxError(Exception):
    """Base of every error normfx raises."""


class OptionError(NormfxError, ValueError):
    """An option, rule or value that normfx does not know."""

    @classmethod
    def unknown(cls, what: str, value: object, valid: Iterable[str], where: str) -> OptionError:
        return cls(f"normfx: unknown {what} {value!r} in {where}; valid: {', '.join(sorted(valid))}")


class VerifyError(NormfxError, AssertionError):
    """A graph broke an invariant between two stages, or a rewritten graph gave another result."""


class StageError(NormfxError, RuntimeError):
    """A stage of normfx failed under strict=True; the original exception is its cause."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(f"normfx: stage '{stage}' failed: {type(error).__name__}: {error}")


class ExportError(NormfxError, TypeError):
    """normfx.rewrite was given something it cannot rewrite."""


class NormfxWarning(UserWarning):
    """A stage failed; the untouched graph is compiled instead."""


def stage_warning(stage: str, error: BaseException) -> str:
    """Text of the one warning given when a stage fails and the original graph is used."""
    return (
        f"normfx: stage '{stage}' failed ({type(error).__name__}: {error}); "
        f"the model is compiled unchanged by Inductor. {REPORT_HINT}"
    )
