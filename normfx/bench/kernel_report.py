"""Results of `normfx bench kernels` as JSON, table, Markdown and picture."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from normfx.bench.contest import COPY, Measured, Result
from normfx.bench.norms import Cell
from normfx.bench.output import (
    grouped_table,
    has_matplotlib,
    machine_line,
    markdown_table,
    quartiles,
    replace,
    spread,
    three_digits,
    where,
)
from normfx.bench.rivals import OURS, RIVALS
from normfx.bench.timing import Quartiles

OWN = OURS[0]


@dataclass(frozen=True)
class Settings:
    """rounds: None for the default; check: nothing is timed"""

    rounds: int | None
    check: bool


@dataclass
class Results:
    """The machine, the settings, why rivals are absent, the cells so far, and how many are left for --resume."""

    machine: dict[str, Any]
    settings: Settings
    absent: dict[str, str]
    cells: list[Measured] = field(default_factory=list)
    left: int = 0

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def load(cls, text: str) -> Results:
        raw = json.loads(text)
        cells = [_measured(cell) for cell in raw["cells"]]
        return cls(raw["machine"], Settings(**raw["settings"]), raw["absent"], cells, raw["left"])


def _measured(raw: dict[str, Any]) -> Measured:
    cell = Cell(**raw.pop("cell"))
    found = {name: Result(**quartiles(r)) for name, r in raw.pop("results").items()}
    speed = raw.pop("speed")
    return Measured(cell, results=found, speed=Quartiles(*speed) if speed else None, **raw)


def write(results: Results, folder: Path, picture: bool) -> None:
    """kernels.json, kernels.md and, if wanted and possible, kernels.png."""
    replace(folder / "kernels.json", results.dump().encode())
    replace(folder / "kernels.md", markdown(results).encode())
    if picture and has_matplotlib() and any(r.of_copy for m in results.cells for r in m.results.values()):
        _plot(results, folder / "kernels.png")


def table(results: Results) -> Table:
    caption = "medians and quartiles of the rounds; of copy: the time of a device copy of as many bytes over its own"
    return grouped_table(*_rows(results.cells), None if results.settings.check else caption)


def _rows(cells: Iterable[Measured]) -> tuple[list[str], list[list[str]]]:
    header = ["norm", "candidate", "launch µs", "graph µs", "GB/s", "of copy", "error", "first call s"]
    rows = []
    for m in cells:
        cell = str(m.cell)
        if m.copy_gb_s:
            rows.append([cell, COPY, "", "", f"{m.copy_gb_s:.0f}", "1", "", ""])
        for name, r in m.results.items():
            rows.append([
                cell, name, _time(r.launch_us), _time(r.graph_us), f"{r.gb_s:.0f}" if r.gb_s else "",
                spread(r.of_copy), f"{r.error:.1e}", f"{r.first_call_s:.1f}",
            ])  # fmt: skip
        rows += [[cell, name, "", "", "", "", _kind(text), ""] for name, text in m.failures.items()]
    used = [
        i for i in range(len(header)) if not rows or any(row[i] for row in rows)
    ]  # without times, no columns for them
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def _time(q: Quartiles | None) -> str:
    return three_digits(q) if q else ""


def _kind(failure: str) -> str:
    return "wrong" if failure.startswith("wrong") else "failed"


def verdict(m: Measured) -> str:
    """Faster, slower, or level: the quartiles of the speed lie on both sides of 1."""
    if m.speed is None:
        return ""
    return "faster" if m.speed.low > 1 else "slower" if m.speed.high < 1 else "level"


def line(m: Measured) -> str:
    """A cell in one line, while the run goes on."""
    own = m.results.get(OWN)
    parts = [f"error {own.error:.1e}" if own else "normfx failed"]
    if own and own.graph_us:
        parts.append(f"{_time(own.graph_us)} µs, {spread(own.of_copy)} of a copy")
    if m.speed:
        parts.append(f"{verdict(m)}: {spread(m.speed)} of {m.best}")
    parts += [f"{name} {_kind(text)}" for name, text in m.failures.items()]
    return f"{m.cell}: {'; '.join(parts)}"


def against_best(cells: Iterable[Measured]) -> tuple[list[str], list[list[str]]]:
    """A table of the speed of normfx's kernels relative to the best rival, a row per cell."""
    header = ["norm", "best rival", "its µs", "normfx µs", "speed", "normfx is"]
    rows = []
    for m in cells:
        if m.best is not None and m.speed is not None:
            rival, own = m.results[m.best], m.results[OWN]
            rows.append([
                str(m.cell), m.best, _time(rival.graph_us), _time(own.graph_us), spread(m.speed), verdict(m),
            ])  # fmt: skip
    return header, rows


def remarks(results: Results) -> list[str]:
    """Wins and losses counted, every loss, who was absent, who has no such norm, and everything wrong or failed."""
    lines = []
    for op, task in dict.fromkeys((m.cell.op, m.cell.task) for m in results.cells):
        compared = [m for m in results.cells if (m.cell.op, m.cell.task) == (op, task) and m.speed is not None]
        counts = {kind: sum(verdict(m) == kind for m in compared) for kind in ("faster", "level", "slower")}
        if compared:
            mean = statistics.geometric_mean(m.speed.middle for m in compared if m.speed)
            lines.append(
                f"{op} {task}: speed {mean:.2f} against the best rival of each shape (geometric mean); "
                + ", ".join(f"{kind} at {count}" for kind, count in counts.items())
            )
    lines += [f"slower: {m.cell}: {spread(m.speed)} of {m.best}" for m in results.cells if verdict(m) == "slower"]
    for m in results.cells:
        kinds = {name: "" if text.startswith("wrong") else "failed: " for name, text in m.failures.items()}
        lines += [f"{m.cell}, {name}: {kinds[name]}{text}" for name, text in m.failures.items()]
    lacking = {(m.cell.op, name): None for m in results.cells for name in m.lacking}
    lines += [f"no {op}: {name}" for op, name in lacking]
    lines += [f"absent: {name}: {why}" for name, why in results.absent.items()]
    if results.left:
        lines.append(f"{results.left} cells are left: continue with --resume")
    return lines


def markdown(results: Results) -> str:
    lines = ["# normfx bench kernels", "", machine_line(results.machine), "", *markdown_table(*_rows(results.cells))]
    header, rows = against_best(results.cells)
    if rows:
        lines += ["", "## normfx against the best rival", "", *markdown_table(header, rows)]
    lines += ["", *(f"- {note}" for note in remarks(results))]
    return "\n".join(lines) + "\n"


def _plot(results: Results, path: Path) -> None:
    """One line of panels for each norm: what part of a copy's rate each candidate reaches, by shape."""
    from matplotlib.figure import Figure  # an extra; without pyplot no display is looked for

    panels = list(dict.fromkeys((m.cell.op, m.cell.task, m.cell.dtype) for m in results.cells))
    figure = Figure(figsize=(10.0, 1.0 + 3.2 * len(panels)), layout="constrained")
    names = [n for n in (*OURS, *RIVALS) if any(n in m.results for m in results.cells)]
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        cells = [m for m in results.cells if (m.cell.op, m.cell.task, m.cell.dtype) == panel]
        for color, name in enumerate(names):
            _draw(axes, cells, name, f"C{color}")
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xticks(range(len(cells)), [f"{m.cell.rows}x{m.cell.width}" for m in cells], rotation=30, ha="right")
        axes.set_ylabel("of a device copy")
        axes.set_title(" ".join(panel))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    figure.suptitle(f"{where(results.machine)}; dots: medians, whiskers: quartiles")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, cells: Sequence[Measured], name: str, color: str) -> None:
    found = [(x, m.results[name].of_copy) for x, m in enumerate(cells) if name in m.results]
    points = [(x, q) for x, q in found if q is not None]
    axes.errorbar(
        [x for x, _ in points],
        [q.middle for _, q in points],
        [[q.middle - q.low for _, q in points], [q.high - q.middle for _, q in points]],
        fmt="o",
        capsize=2,
        color=color,
        label=name,
    )
