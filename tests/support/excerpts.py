"""Goldens: files that a run writes and a person reads. Graphs as they show them: norms, folds, linears and the stream,
values renumbered in order of appearance, so that they do not change with how a library builds its attention masks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

OPS = (
    "rms_norm crms_norm layer_norm add_rms_norm add_crms_norm add_layer_norm norm_add_norm center compress "
    "compress_input scale_features fold_shift linear addmm add embedding conv2d cat dropout sub"
)
SHOWN = re.compile(rf" = ({OPS.replace(' ', '|')})\(|^return")


def excerpt(text: str) -> str:
    """The lines of a graph that matter here, values renumbered by appearance; a value whose line is left out is shown
    as the op that made it: <view>."""
    made = {value: op for line in text.splitlines() for value, op in _made(line)}
    lines = [line for line in text.splitlines() if SHOWN.search(line) and ": i64[" not in line]
    shown = {value for line in lines for value, _ in _made(line)}
    numbers: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        value = match[0]
        return numbers.setdefault(value, f"%{len(numbers)}") if value in shown else f"<{made[value]}>"

    return "\n".join(re.sub(r"%\d+", renamed, line) for line in lines) + "\n"


def _made(line: str) -> Iterator[tuple[str, str]]:
    """The values that a line defines, and its op."""
    values, equals, rest = line.partition(" = ")
    for value in values.split(", ") if equals else ():
        yield value, rest.partition("(")[0]


def accepted(path: Path, text: str) -> None:
    """Equal to the golden at this path, which EXPECTTEST_ACCEPT=1 writes."""
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"there is no {path.name} yet: run with EXPECTTEST_ACCEPT=1, and read it"
    assert text == path.read_text(encoding="utf-8")
