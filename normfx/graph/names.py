"""Readable names: where a value lives in the user's model, and which line made it."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import torch
from torch.fx import Node

_STEP = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]|\.?([^.\[\]]+)")
_ROOTS = frozenset({"self", "fn"})  # `fn`: the module inside the wrapper Dynamo puts around a torch.nn module
_NOISE = frozenset({"_modules", "_parameters", "_buffers", "_orig_mod", "_module", "__dict__", "__self__"})


def dotted(expression: str) -> str:
    """A Dynamo source or module-stack path as a dotted path.

    >>> dotted("L['self']._modules['h']._modules['0']._parameters['weight']")
    'h.0.weight'
    >>> dotted("L['self'].h[0].ln_1")
    'h.0.ln_1'
    """
    steps = [(bracket or plain) for bracket, plain in _STEP.findall(expression.replace(".size()[", ".size["))]
    if steps and steps[0] in ("L", "G"):
        steps = steps[1:]
    if len(steps) > 1 and steps[0] in _ROOTS:
        steps = steps[1:]
    return ".".join(s for s in steps if s and s not in _NOISE)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module a node was made in; '' when there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return dotted(path)


_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+), in (?P<where>.*)\n(?P<code>.*)')
_TORCH = str(PurePath(torch.__file__).parent)


def source_line(node: Node) -> str:
    """'model.py:210 in forward: x = self.ln_1(x)': the innermost frame outside torch; '' if there is none."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    outside = [f for f in frames if not f["file"].startswith(_TORCH)]
    frame = (outside or frames)[-1]
    return f"{PurePath(frame['file']).name}:{frame['line']} in {frame['where']}: {frame['code'].strip()}"


def source_name(source: Any) -> str:
    """Expression of a Dynamo source; `source.name` is a property on torch 2.13 and 2.15, a method before."""
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)
