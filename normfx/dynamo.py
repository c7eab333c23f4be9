"""What Dynamo says about graphs and graph breaks, and how an error reaches the user through it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, cast

import torch
from torch.fx import GraphModule

from normfx.compat.dynamo import SHORTENS, STEERING, compilation_metrics, config, exc, graph_break_reasons
from normfx.errors import NormfxError
from normfx.records import GraphBreak

_TORCH = str(PurePath(torch.__file__).parent)
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)")
_HINT = re.compile(r"^\s*Hint:\s*(.+)$", re.MULTILINE)


def function(gm: GraphModule) -> str:
    """'forward (model.py:41)': the function of which Dynamo traced this graph, and the line at which the graph ends."""
    frame = _frame(_stack(getattr(gm, "compile_subgraph_reason", None)), outermost=True)
    if frame is None or PurePath(frame.filename).parent.name == "_dynamo":  # its wrapper of a module of torch's own
        return ""
    resumed = _RESUMED.fullmatch(frame.name)
    name = f"{resumed[1]}, from line {resumed[2]}" if resumed else frame.name
    return f"{name} ({PurePath(frame.filename).name}:{frame.lineno})"


@contextmanager
def recording_breaks() -> Iterator[list[GraphBreak]]:
    """Fills the list with the graph breaks of what is compiled meanwhile, each place and cause once."""
    found: list[GraphBreak] = []
    reasons = graph_break_reasons()
    before, earlier = len(reasons), compilation_metrics()
    yield found
    ended = [_graph_break(str(reason.reason), _stack(reason)) for reason in reasons[before:]]
    # a frame that Dynamo gives up altogether, for a break inside of a loop, say, ends no graph: it is a failure
    failed = [each for each in compilation_metrics() if all(each is not old for old in earlier)]
    found += dict.fromkeys([*ended, *(_given_up(each) for each in failed if getattr(each, "fail_reason", None))])


def is_disabled() -> bool:
    """Whether torch.compile does nothing in this process."""
    return bool(config.disable)


def _graph_break(text: str, stack: Iterable[traceback.FrameSummary]) -> GraphBreak:
    """text: Dynamo's, whose first line names the cause"""
    frame, hint = _frame(stack, outermost=False), _HINT.search(text)
    cause = text.strip().splitlines()[0] if text.strip() else "unknown"
    return GraphBreak(_place(frame) if frame else "", cause, hint[1].strip() if hint else "")


def _given_up(metrics: Any) -> GraphBreak:
    file, line = metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno
    stack = [traceback.FrameSummary(file, line, metrics.co_name)] if file and line else []
    return _graph_break(str(metrics.fail_reason), stack)


def _stack(reason: Any) -> list[traceback.FrameSummary]:
    return list(getattr(reason, "user_stack", None) or ())


def _frame(stack: Iterable[traceback.FrameSummary], outermost: bool) -> traceback.FrameSummary | None:
    """The outermost or innermost frame outside of torch, else the innermost one."""
    frames = list(stack)
    own = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    if own:
        return own[0 if outermost else -1]
    return frames[-1] if frames else None


def _place(frame: traceback.FrameSummary) -> str:
    code = f": {frame.line.strip()}" if frame.line else ""
    return f"{PurePath(frame.filename).name}:{frame.lineno} in {frame.name}{code}"


# ---------------------------------------------------------------- errors


def handed_on(error: NormfxError) -> NormfxError:
    """The same error, of the same class, as one that Dynamo hands on as it is.

    Dynamo wraps what a backend raises in an error of its own, except errors that know how to shorten their traceback.
    """
    kind, short = type(error), SHORTENS
    if short is None:
        return error

    def __init__(self: Any, error: NormfxError) -> None:
        Exception.__init__(self, *error.args)
        self.first_useful_frame = None

    def remove_dynamo_frames(self: Any) -> Any:
        return self if config.verbose else self.with_traceback(None)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    body = {**names, "__init__": __init__, "remove_dynamo_frames": remove_dynamo_frames}
    return cast(NormfxError, type(kind.__name__, (kind, short), body)(error))


@contextmanager
def explained(note: str) -> Iterator[None]:
    """Adds `note` to whatever exception is raised meanwhile, except to those with which torch steers Dynamo.

    Other exceptions than Dynamo's own are wrapped as Dynamo would wrap them: it does not hand on their notes.
    """
    try:
        yield
    except exc.TorchDynamoException as error:
        if isinstance(error, SHORTENS or ()):
            error.add_note(note)
        raise
    except (*STEERING, NormfxError):
        raise
    except IndexError as error:  # torch 2.13 and newer hand it on
        error.add_note(note)
        raise
    except Exception as error:
        wrapped = exc.BackendCompilerFailed(normfx_backend, error, inspect.currentframe())
        wrapped.add_note(note)
        raise wrapped.with_traceback(error.__traceback__) from error


def normfx_backend() -> None:
    """Stands for the backend in the text of torch's error."""


normfx_backend.__name__ = "normfx"
