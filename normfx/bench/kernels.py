"""`normfx bench kernels`: the generated norm kernels against every rival that is installed."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console

from normfx.bench import command, kernel_report, machine, rivals
from normfx.bench.clock import Clock, DeviceClock
from normfx.bench.command import words
from normfx.bench.contest import ROUNDS, Measured, measure
from normfx.bench.kernel_report import Results, Settings
from normfx.bench.measure import failure_text
from normfx.bench.norms import OPS, PASSES, Cell
from normfx.bench.output import has_matplotlib, no_matplotlib, show
from normfx.bench.rivals import OURS, RIVALS
from normfx.errors import OptionError
from normfx.kernels.spec import DTYPES

SUMMARY = "the generated norm kernels against eager, Inductor and other packages' norms"

Shape = tuple[int, int]

MAIN_SHAPES: tuple[Shape, ...] = ((16384, 4096), (4096, 768))
MORE_SHAPES: tuple[Shape, ...] = (
    (8192, 8192), (2048, 4096), (131072, 128), (1, 4096), (16, 4096), (4096, 127), (4096, 192), (4096, 1023),
    (4096, 1024), (4096, 5120), (4096, 12288), (4096, 32768), (4096, 65536),
)  # fmt: skip
SWEPT = "rms_norm"
"""By default every norm is run at the main shapes, and this one at all: compiling a candidate for one shape takes
seconds, running it milliseconds, so the number of compilations is what a run costs."""

NARROWEST = 16
"""The narrowest rows compared: some narrower ones have entries so close together that a right result, of a rounded
sum, looks wrong."""

DEFAULT_RIVALS = tuple(name for name in RIVALS if name != "inductor-max-autotune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = f"ROWSxWIDTH, …; by default {_listed(MAIN_SHAPES)}, and for {SWEPT} also {_listed(MORE_SHAPES)}"
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument("--passes", default=",".join(PASSES), help=f"of {', '.join(PASSES)}")
    parser.add_argument("--dtypes", default="bfloat16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--shapes", help=shapes)
    rival_help = f"of {', '.join(RIVALS)}; those that are not installed are listed and left out"
    parser.add_argument("--rivals", default=",".join(DEFAULT_RIVALS), help=rival_help)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu with --check")
    parser.add_argument("--rounds", type=int, help=f"timed rounds, by default {ROUNDS}")
    parser.add_argument("--check", action="store_true", help="compare results with float64, time nothing")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many: the rest is for --resume")
    parser.add_argument("--resume", action="store_true", help="keep the cells of an earlier run of the same settings")
    parser.add_argument("--dry-run", action="store_true", help="name the cells and candidates, measure nothing")
    parser.add_argument("--output", type=Path, default=Path("normfx-bench"), metavar="DIR")


def main(parsed: argparse.Namespace) -> int:
    """Measure the cells that the arguments name, writing the results so far after each. Exit status 1: something was
    wrong or failed.

    Raises OptionError for what cannot be run here or is not known, before anything is measured.
    """
    console = command.console()
    cells = _cells(parsed)
    chosen = words(parsed.rivals, "--rivals", "rival", RIVALS)
    if parsed.dry_run:
        for cell in cells:
            console.print(f"{cell}: {', '.join((*OURS, *chosen))}", highlight=False, markup=False)
        return 0
    _check_device(parsed)
    names, absent = rivals.present(chosen)
    results = _results(parsed, absent)
    done = {m.cell: m for m in results.cells}
    end = command.deadline(parsed.minutes)
    command.make_folder(parsed.output)
    clock = None if parsed.check else DeviceClock(parsed.device)
    todo = [cell for cell in cells if not _complete(done.get(cell), names)]
    with command.progress(console) as progress:
        task = progress.add_task("cells", total=len(todo), stage="")
        for i, cell in enumerate(todo):
            results.left = len(todo) - i
            if time.monotonic() > end:
                break
            done[cell] = _measured(cell, names, parsed.rounds, clock, lambda stage: progress.update(task, stage=stage))
            results.cells, results.left = list(done.values()), results.left - 1
            kernel_report.write(results, parsed.output, picture=False)
            progress.console.print(kernel_report.line(done[cell]), highlight=False, markup=False)
            progress.advance(task)
    kernel_report.write(results, parsed.output, picture=True)  # only once: of many panels it takes seconds
    _show(results, console)
    console.print(f"written to {parsed.output}", highlight=False)
    return int(any(m.failures for m in results.cells))


def _cells(parsed: argparse.Namespace) -> list[Cell]:
    """The cells, the most important first: --minutes may cut the end off."""
    ops = words(parsed.ops, "--ops", "op", OPS)
    passes = words(parsed.passes, "--passes", "pass", PASSES)
    dtypes = words(parsed.dtypes, "--dtypes", "dtype", DTYPES)
    if parsed.shapes is not None:
        shapes = list(itertools.product([_shape(word) for word in words(parsed.shapes, "--shapes")], ops))
    else:
        shapes = [*itertools.product(MAIN_SHAPES, ops), *((shape, SWEPT) for shape in MORE_SHAPES if SWEPT in ops)]
    cells = [
        Cell(op, task, dtype, *shape, parsed.device)
        for (shape, op), dtype, task in itertools.product(shapes, dtypes, passes)
    ]
    if not cells:
        raise OptionError("normfx: nothing to compare: one of --ops, --passes, --dtypes and --shapes is empty")
    return cells


def _shape(word: str) -> Shape:
    rows, _, width = word.partition("x")
    if not (rows.isdecimal() and width.isdecimal() and int(rows) >= 1 and int(width) >= NARROWEST):
        example = f"such as 4096x768, with widths from {NARROWEST} on"
        raise OptionError(f"normfx: --shapes takes ROWSxWIDTH, {example}, not {word!r}")
    return int(rows), int(width)


def _listed(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{rows}x{width}" for rows, width in shapes)


def _check_device(parsed: argparse.Namespace) -> None:
    command.check(parsed.rounds, parsed.device)
    if importlib.util.find_spec("triton") is None:
        raise OptionError("normfx: generated kernels need triton: pip install 'normfx[gpu]'")
    cuda = torch.device(parsed.device).type == "cuda"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if not cuda and not parsed.check:
        raise OptionError(f"normfx: --device {parsed.device}: kernels are timed on CUDA only; --check only compares")
    if cuda == interpreted:
        how = "unset TRITON_INTERPRET" if cuda else "set TRITON_INTERPRET=1"
        raise OptionError(f"normfx: --device {parsed.device}: {how} (Triton's interpreter is how kernels run on a CPU)")
    command.use(parsed.device)


def _results(parsed: argparse.Namespace, absent: dict[str, str]) -> Results:
    """New results, or under --resume those of an earlier run, if they are of the same machine and settings."""
    packages = {r.package: machine.version(r.package) for r in RIVALS.values() if r.package}
    here, settings = {**machine.describe(parsed.device), **packages}, Settings(parsed.rounds, parsed.check)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = parsed.output / "kernels.json"
    if not parsed.resume or not path.exists():
        return Results({**here, "date": date}, settings, absent)
    old = Results.load(path.read_text())
    now = {**here, **dataclasses.asdict(settings)}
    command.unchanged(path, {**old.machine, **dataclasses.asdict(old.settings)}, now)
    return dataclasses.replace(old, absent=absent, left=0)


def _complete(measured: Measured | None, names: Iterable[str]) -> bool:
    """Whether there is nothing left to measure; cells with failures are measured again."""
    return measured is not None and not measured.failures and {*OURS, *names} <= {*measured.results, *measured.lacking}


def _measured(
    cell: Cell, names: list[str], rounds: int | None, clock: Clock | None, say: Callable[[str], None]
) -> Measured:
    try:
        return measure(cell, names, rounds, clock, lambda stage: say(f"{cell}: {stage}"))
    except Exception as error:  # a shape that does not fit into memory, say: the run goes on
        return Measured(cell, cell.bytes, failures={"cell": failure_text(error)})


def _show(results: Results, console: Console) -> None:
    console.print(kernel_report.table(results))
    show(console, "normfx against the best rival", *kernel_report.against_best(results.cells))
    for line in kernel_report.remarks(results):
        console.print(line, highlight=False, markup=False)
    if not results.settings.check and not has_matplotlib():
        console.print(no_matplotlib("kernels.png"), markup=False)
