"""What the outputs of `normfx bench` have in common: files, tables in Markdown, numbers."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normfx.bench.timing import Quartiles


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def no_matplotlib(picture: str) -> str:
    return f"normfx: no {picture}: matplotlib is missing (pip install 'normfx[bench]')"


def machine_line(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)


def where(machine: Mapping[str, Any]) -> str:
    """The title of a picture: what was measured on."""
    return f"{machine['cpu' if machine['device'] == 'cpu' else 'device']}, torch {machine['torch']}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def grouped_table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None) -> Table:
    """A section for each run of rows that begin alike, under that beginning."""
    shown = Table(*header[1:], caption=caption)
    for first, group in itertools.groupby(rows, key=lambda row: row[0]):
        shown.add_section()
        shown.add_row(Text(first, style="bold"))
        for _, *row in group:
            shown.add_row(*row)
    return shown


def show(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, if there are rows."""
    if rows:
        shown = Table(*header, title=title)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def three_digits(q: Quartiles) -> str:
    """The median to three digits that count, the quartiles as precisely."""
    digits = max(0, 2 - math.floor(math.log10(q.middle)))
    return f"{q.middle:.{digits}f} ({q.low:.{digits}f}–{q.high:.{digits}f})"


def spread(q: Quartiles | None) -> str:
    return "" if q is None else f"{q.middle:.2f} ({q.low:.2f}–{q.high:.2f})"


def quartiles(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a result as they were before JSON: three numbers in brackets are quartiles."""
    return {key: Quartiles(*x) if isinstance(x, list) else x for key, x in raw.items()}
