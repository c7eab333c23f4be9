"""Results of the benchmark as JSON, table, Markdown and picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from normfx.bench.measure import VARIANTS, Cell, Measured, Result, Settings
from normfx.bench.models import CHAIN, CHAIN_PARAMETERS
from normfx.bench.output import (
    grouped_table,
    has_matplotlib,
    machine_line,
    markdown_table,
    no_matplotlib,
    quartiles,
    replace,
    spread,
    three_digits,
    where,
)
from normfx.bench.timing import Quartiles

NO_MATPLOTLIB = no_matplotlib("bench.png")
OVERHEAD_UNIT = 150  # parameters


@dataclass
class Results:
    """Everything that a run knows: the machine, the settings, the cells so far, and how many are left for --resume."""

    machine: dict[str, Any]
    settings: Settings
    cells: list[Measured] = field(default_factory=list)
    left: int = 0

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def load(cls, text: str) -> Results:
        raw = json.loads(text)
        cells = [_measured(cell) for cell in raw["cells"]]
        return cls(raw["machine"], Settings(**raw["settings"]), cells, raw.get("left", 0))


def _measured(raw: dict[str, Any]) -> Measured:
    found = {name: Result(**quartiles(r)) for name, r in raw["results"].items()}
    cell, failures, skipped = Cell(**raw["cell"]), raw["failures"], raw.get("skipped", {})
    return Measured(cell, found, failures, skipped, raw.get("floor_ms"))


def write(results: Results, folder: Path) -> None:
    """bench.json, bench.md and, where matplotlib is installed, bench.png; whole or not at all."""
    replace(folder / "bench.json", results.dump().encode())
    replace(folder / "bench.md", markdown(results).encode())
    if _models(results.cells) and has_matplotlib():
        _plot(results, folder / "bench.png")


def table(results: Results) -> Table:
    caption = f"medians and quartiles of the rounds; speed: times as fast as {results.settings.base}"
    return grouped_table(*_rows(results.cells), caption)


def markdown(results: Results) -> str:
    lines = ["# normfx bench", "", machine_line(results.machine), "", *markdown_table(*_rows(results.cells))]
    if _models(results.cells):
        title = f"## Speed relative to {results.settings.base}, all cells"
        lines += ["", title, "", *markdown_table(*summary(results))]
    if notes := remarks(results):
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _rows(cells: Iterable[Measured]) -> tuple[list[str], list[list[str]]]:
    header = [
        "cell",
        "variant",
        "ms",
        "floor ms",
        "speed",
        "graph ms",
        "graph speed",
        "error",
        "first call s",
        "peak MB",
    ]
    rows = []
    for measured in cells:
        cell = str(measured.cell)
        for name, r in measured.results.items():
            peak = "" if r.peak_mb is None else f"{r.peak_mb:.0f}"
            replay = "" if r.graph_ms is None else three_digits(r.graph_ms)
            rows.append([
                cell, name, three_digits(r.ms), _floor(measured.floor_ms, r.ms), spread(r.speed), replay,
                spread(r.graph_speed), f"{r.error:.1e}", f"{r.first_call_s:.1f}", peak,
            ])  # fmt: skip
        rows += [[cell, name, "failed", *[""] * (len(header) - 3)] for name in measured.failures]
    asked = ("floor ms", "graph ms", "graph speed", "peak MB")  # columns of what is measured only when it is asked for
    shown = [i for i, name in enumerate(header) if name not in asked or any(row[i] for row in rows)]
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _floor(floor: float | None, ms: Quartiles) -> str:
    """The time of the products alone, and its part of the median."""
    return "" if floor is None else f"{floor:.3g} ({floor / ms.middle:.0%})"


def summary(results: Results) -> tuple[list[str], list[list[str]]]:
    """Per task and variant: geometric mean of the speeds, and the cells whose quartiles lie on one side of 1."""
    found: dict[tuple[str, str], list[Quartiles]] = {}
    for measured in _models(results.cells):
        for name, r in measured.results.items():
            if r.speed is not None and name != results.settings.base:
                found.setdefault((measured.cell.task, name), []).append(r.speed)
    header = ["task", "variant", "geometric mean", "cells", "slower beyond noise", "faster beyond noise"]
    rows = [
        [
            task,
            name,
            f"{statistics.geometric_mean(q.middle for q in speeds):.3f}",
            str(len(speeds)),
            str(sum(q.high < 1 for q in speeds)),
            str(sum(q.low > 1 for q in speeds)),
        ]
        for (task, name), speeds in found.items()
    ]
    return header, rows


def remarks(results: Results) -> list[str]:
    """The call overhead, where it was measured, every failure, and what is left."""
    lines, base = [], results.settings.base
    for measured in results.cells:
        if measured.cell.model == CHAIN:
            scale = OVERHEAD_UNIT / CHAIN_PARAMETERS
            for name, r in measured.results.items():
                if r.extra_us is not None and name != base:
                    extra = Quartiles(*(scale * us for us in r.extra_us))
                    lines.append(
                        f"{measured.cell.task} call, {name} minus {base}, per {OVERHEAD_UNIT} parameters: "
                        f"{extra.middle:.1f} µs ({extra.low:.1f} to {extra.high:.1f})"
                    )
        lines += [f"failed: {measured.cell}, {name}: {text}" for name, text in measured.failures.items()]
        lines += [f"skipped: {measured.cell}, {name}: {text}" for name, text in measured.skipped.items()]
    if results.left:
        lines.append(f"left: {results.left} cells, for --resume")
    return lines


def _models(cells: Iterable[Measured]) -> list[Measured]:
    """Cells to be judged by speed: the chain, which is all overhead, is none of them."""
    return [m for m in cells if m.cell.model != CHAIN and any(r.speed for r in m.results.values())]


def _plot(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure  # an extra; without pyplot no display is looked for

    cells = _models(results.cells)
    base = results.settings.base
    names = [n for n in VARIANTS if n != base and any(n in m.results for m in cells)]
    figure = Figure(figsize=(max(6.0, 2.0 + 0.25 * len(cells) * (len(names) + 1)), 5.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [(x, s) for x, m in enumerate(cells) if name in m.results and (s := m.results[name].speed)]
        axes.bar(
            [x + (i - (len(names) - 1) / 2) * width for x, _ in bars],
            [s.middle for _, s in bars],
            width,
            yerr=[[s.middle - s.low for _, s in bars], [s.high - s.middle for _, s in bars]],
            capsize=2,
            label=name,
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(cells)), [str(m.cell) for m in cells], rotation=45, ha="right")
    axes.set_ylabel(f"speed relative to {base}")
    axes.set_title(f"{where(results.machine)}; bars: medians, whiskers: quartiles")
    if names:
        figure.legend(loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=150)
