"""Graphs as goldens show them: norms, folds, linears and the stream, values renumbered in order of appearance, so that
they do not change with how a library builds its attention masks."""

from __future__ import annotations

import re

OPS = (
    "rms_norm crms_norm layer_norm add_rms_norm add_crms_norm add_layer_norm norm_add_norm center compress "
    "compress_input scale_features fold_shift linear addmm add embedding conv2d cat dropout sub"
)
SHOWN = re.compile(rf" = ({OPS.replace(' ', '|')})\(|^return")


def excerpt(text: str) -> str:
    """The lines of a graph that matter here, values renumbered by appearance."""
    numbers: dict[str, str] = {}
    lines = [line for line in text.splitlines() if SHOWN.search(line) and ": i64[" not in line]
    return "\n".join(re.sub(r"%\d+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), x) for x in lines) + "\n"
