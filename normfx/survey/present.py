"""The survey as table, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from normfx.bench.output import machine_line, markdown_table, replace, show
from normfx.survey.row import Row

TITLE = "LayerNorms that kept their mean, by class"

ABOUT = """\
# Survey

What normfx does to the LayerNorms of a zoo of published architectures: the classes of `transformers`, `timm` and
`torchvision` themselves, with random weights, few features a row, and the head they were published with. Depth is the
published one up to 12 layers; where it is less, the table says so. Norms' weights, biases and scales are moved off ones
and zeros, so that a wrong fold shows.

```sh
pip install "normfx[survey]"
normfx survey                          # everything; writes survey.md and survey.json to --output
normfx survey --models gpt2,bert       # some families; --list names them
normfx survey --train                  # gradients recorded, folds counted as free
normfx survey --defer                  # with the rule defer_norm, as if the means of all rows were small
```

Each family is captured by Dynamo in eval, without gradients, with the default options under `strict`, and each
rewritten graph is run without a compiler next to the original in float64. **error** is the largest difference relative
to the largest entry of an output; above 1e-9 the family has failed, and the exit status is 1. What a model asks for in
float32 by name is computed in float64 on both sides, and the whole is compared with the model as it is.

**LayerNorm** and **RMSNorm** count the norms of the graphs, however they are spelled. **converted** LayerNorms became
RMSNorms; **deferred** ones became a factor of the products that read them, which [defer_norm](rules.md) does on
request (`--defer`); **kept** ones did neither, by the [code](refusals.md) of the refusal. A family with more than one
graph has graph breaks. Families without LayerNorms are here because they must pass through unharmed.

This page is written by `normfx survey --defer --output docs`.
"""

HEADER = ("family", "package", "depth", "LayerNorm", "RMSNorm", "converted", "deferred", "kept", "graphs", "error")


def table(rows: Sequence[Row]) -> Table:
    header, lines = _lines(rows)
    shown = Table(*header, "s")
    for line, row in zip(lines, rows, strict=True):
        shown.add_row(*line, f"{row.seconds:.1f}")
    return shown


def summary(console: Console, rows: Sequence[Row]) -> None:
    """What lies below the table: totals, classes, failures."""
    console.print(totals(rows), highlight=False)
    show(console, TITLE, *classes(rows))
    for line in remarks(rows):
        console.print(line, highlight=False, markup=False)


def write(rows: Sequence[Row], machine: Mapping[str, Any], folder: Path) -> None:
    """survey.md and survey.json; whole or not at all."""
    found = {"machine": dict(machine), "totals": counts(rows), "families": [dataclasses.asdict(row) for row in rows]}
    replace(folder / "survey.json", (json.dumps(found, indent=1) + "\n").encode())
    replace(folder / "survey.md", markdown(rows, machine).encode())


def markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    header, lines = _lines(rows)
    text = [ABOUT, machine_line(machine), "", totals(rows), "", *markdown_table(header, lines)]
    if any(row.kept for row in rows):
        text += ["", f"## {TITLE}", "", *markdown_table(*classes(rows))]
    if notes := remarks(rows):
        text += ["", "## Not surveyed", "", *(f"- {note}" for note in notes)]
    return "\n".join(text) + "\n"


def counts(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "families": len(rows),
        "failed": sum(bool(row.failure) for row in rows),
        "skipped": sum(bool(row.skipped) for row in rows),
        "layer_norms": sum(row.layer_norms for row in rows),
        "converted": sum(row.converted for row in rows),
        "deferred": sum(row.deferred for row in rows),
        "rms_norms": sum(row.rms_norms for row in rows),
    }


def totals(rows: Sequence[Row]) -> str:
    n = counts(rows)
    ran = n["families"] - n["failed"] - n["skipped"]

    def share(name: str) -> str:
        return f"{n[name]} ({100 * n[name] / n['layer_norms']:.1f} %)" if n["layer_norms"] else "0"

    became = f"{share('converted')} became RMSNorms" + (f", {share('deferred')} were deferred" if n["deferred"] else "")
    return (
        f"{ran} families ran, {n['failed']} failed, {n['skipped']} skipped. {n['layer_norms']} LayerNorms: {became}; "
        f"{n['rms_norms']} RMSNorms."
    )


def classes(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: each class, how many LayerNorms, and in which families; most first."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for kept in row.kept:
            found[kept.because][row.family] += 1
    ordered = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    lines = [
        [name, str(where.total()), ", ".join(f"{family} {n}" for family, n in where.most_common())]
        for name, where in ordered
    ]
    return ["class", "norms", "families"], lines


def remarks(rows: Iterable[Row]) -> list[str]:
    """Failures and skipped families."""
    return [
        f"{row.family}: failed: {row.failure}" if row.failure else f"{row.family}: skipped: {row.skipped} is missing"
        for row in rows
        if row.failure or row.skipped
    ]


def _lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    return list(HEADER), [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    if row.failure or row.skipped:
        return [row.family, row.package, row.depth, *[""] * 4, "failed" if row.failure else "skipped", "", ""]
    codes = Counter(kept.codes[0] if kept.codes else "not captured" for kept in row.kept)
    return [
        row.family, row.package, row.depth, str(row.layer_norms), str(row.rms_norms), str(row.converted),
        str(row.deferred), ", ".join(f"{code} {n}" for code, n in codes.most_common()), str(row.graphs),
        f"{row.error:.0e}",
    ]  # fmt: skip
