"""Every error and warning a user of normfx can meet: what happened, where, what to do."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import PurePath

STRICT_HINT = "Without options={'strict': True} the untouched graph is compiled; please report it in either case."
REPORT_HINT = "Please report it with the output of NORMFX_DEBUG=2, or set options={'strict': True} to raise here."


class NormfxError(Exception):
    """Base of every error normfx raises."""


class OptionError(NormfxError, ValueError):
    """An option, rule or value that normfx does not know."""

    @classmethod
    def unknown(cls, what: str, value: object, valid: Iterable[str], where: str) -> OptionError:
        known = sorted(valid)
        meant = did_you_mean(str(value), known)
        return cls(f"normfx: unknown {what} {value!r} in {where}; valid: {', '.join(known)}{meant and f'; {meant}'}")


class VerifyError(NormfxError, AssertionError):
    """A graph broke an invariant between two stages, or a rewritten graph gave another result."""


class StageError(NormfxError, RuntimeError):
    """A stage of normfx failed under strict=True; the original exception is its cause."""

    def __init__(self, stage: str, error: BaseException) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1:]
        at = "".join(f" (at {PurePath(frame.filename).name}:{frame.lineno})" for frame in where)
        super().__init__(f"normfx: stage '{stage}' failed: {type(error).__name__}: {error}{at}. {STRICT_HINT}")


class ExportError(NormfxError, TypeError):
    """normfx.rewrite was given something it cannot rewrite."""


class ConvertError(NormfxError, ValueError):
    """normfx.convert was given something it cannot convert."""


class NormfxWarning(UserWarning):
    """A stage failed and the untouched graph is compiled instead, or a setting has no effect."""


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """'did you mean "rules"?', or "" where nothing valid is like what was given."""
    near = difflib.get_close_matches(given, list(valid), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """The class of an exception, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def crash_note(stage: str, changed: bool) -> str:
    """What is added to an exception that Inductor or the compiled graph raised: normfx, the stage, the way out."""
    if not changed:
        return f"normfx: raised at stage '{stage}', of a graph that normfx left as it is; try backend='inductor'."
    return (
        f"normfx: raised at stage '{stage}', of a graph that normfx rewrote. options={{'rules': 'none'}} or "
        "backend='inductor' tells whether it has to do with that; if so, please report it."
    )


def stage_warning(stage: str, error: BaseException, then: str = "the model is compiled unchanged by Inductor") -> str:
    """Text of the one warning given when a stage fails; `then`: what happens in its place."""
    return f"normfx: stage '{stage}' failed ({type(error).__name__}: {error}); {then}. {REPORT_HINT}"
