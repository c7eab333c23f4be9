"""`normfx bench`: models × {eager, Inductor, Inductor freezing, normfx, normfx frozen, …}, forward or training.

`normfx bench kernels`, of norms alone, is in kernels.py; `normfx bench depth`, of compile times, in depth.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console

from normfx.bench import command, depth, kernels, machine, present
from normfx.bench.command import words
from normfx.bench.measure import BASE, TASKS, VARIANTS, Cell, Measured, Settings, failure_text, measure
from normfx.bench.models import CHAIN, DTYPES, MODELS, factory, make
from normfx.bench.output import has_matplotlib, show
from normfx.bench.present import Results
from normfx.errors import OptionError

ALL_MODELS = tuple(name for name in MODELS if name != CHAIN)
OTHERS = {"kernels": kernels, "depth": depth}
ALL_VARIANTS = tuple(name for name in VARIANTS if not VARIANTS[name].asked)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = f"of {', '.join(ALL_MODELS)}, and module:factory, where factory(batch) returns a module and its inputs"
    parser.add_argument("--models", default=",".join(ALL_MODELS), help=listed)
    parser.add_argument("--dtypes", default="float32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--task", default="forward", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--variants", default=",".join(ALL_VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--base", default=BASE, help=f"the variant that ratios are to, always measured; {BASE}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--rounds", type=int, help="timed rounds; by default 15, or more where calls are short")
    parser.add_argument("--cold", action="store_true", help="compile without Inductor's caches")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each variant in its own process")
    parser.add_argument("--graphs", action="store_true", help="CUDA: replays of each variant's CUDA graph too")
    parser.add_argument("--floor", action="store_true", help="the time of the products alone next to each figure")
    parser.add_argument("--overhead", action="store_true", help="only the call overhead: a chain of 300 parameters")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many: the rest is for --resume")
    parser.add_argument("--resume", action="store_true", help="keep the cells of an earlier run of the same settings")
    parser.add_argument("--dry-run", action="store_true", help="make the models, name the cells, measure nothing")
    parser.add_argument("--output", type=Path, default=Path("normfx-bench"), metavar="DIR")
    parser.set_defaults(run=main, parser=parser)
    others = parser.add_subparsers(title="other benchmarks, with options of their own", metavar="kernels, depth")
    for name, other in OTHERS.items():
        own = others.add_parser(name, help=other.SUMMARY, description=other.SUMMARY)
        own.set_defaults(run=other.main, parser=own)
        other.add_arguments(own)


def main(parsed: argparse.Namespace) -> int:
    """Measure the cells that the arguments name, writing the results so far after each. Exit status 1: some failed.

    Raises OptionError for an unknown model, dtype, task or variant, before anything is measured.
    """
    console = command.console()
    cells, variants = _chosen(parsed)
    if parsed.dry_run:
        return _dry_run(cells, variants, console)
    settings = Settings(
        parsed.rounds, parsed.cold, parsed.memory, parsed.threads, parsed.base, parsed.graphs, parsed.floor
    )
    settings.apply(parsed.device)
    results = _results(parsed, settings)
    done = {m.cell: m for m in results.cells}
    end = command.deadline(parsed.minutes)
    command.make_folder(parsed.output)
    with command.progress(console) as progress:
        _warm_up(parsed.device)
        task = progress.add_task("cells", total=len(cells), stage="")
        for i, cell in enumerate(cells):
            wanted = _wanted(cell, variants)
            results.left = len(cells) - i
            if time.monotonic() > end:
                break
            results.left -= 1
            if not _complete(done.get(cell), wanted):
                done[cell] = _measured(cell, wanted, settings, lambda stage: progress.update(task, stage=stage))
                results.cells = list(done.values())
                present.write(results, parsed.output)
            progress.advance(task)
    present.write(results, parsed.output)
    _show(results, console)
    console.print(f"written to {parsed.output}", highlight=False)
    return int(any(m.failures for m in results.cells))


def _dry_run(cells: list[Cell], variants: list[str], console: Console) -> int:
    """What would be measured, with models made on the CPU."""
    for cell in cells:
        model, _ = make(cell.model, cell.dtype, cell.batch, "cpu")
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        console.print(f"{cell}, {millions:.1f} million parameters: {', '.join(_wanted(cell, variants))}", markup=False)
    return 0


def _wanted(cell: Cell, variants: Iterable[str]) -> list[str]:
    return [v for v in variants if cell.task == "forward" or VARIANTS[v].trains]


def _chosen(parsed: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """The cells to measure, and the variants, in the order of VARIANTS."""
    base = words(parsed.base, "--base", "variant", VARIANTS)
    if len(base) != 1:
        raise OptionError(f"normfx: --base takes one variant, not {parsed.base!r}")
    variants = {*base, *words(parsed.variants, "--variants", "variant", VARIANTS)}
    if parsed.overhead:
        variants.add("normfx-no-rules")
        cells = [Cell(CHAIN, "float32", 1, "forward", parsed.device)]
    else:
        models = words(parsed.models, "--models")
        for name in models:
            factory(name)
        dtypes = words(parsed.dtypes, "--dtypes", "dtype", DTYPES)
        tasks = words(parsed.task, "--task", "task", TASKS)
        batches = [int(b) if b.isdecimal() else 0 for b in words(parsed.batches, "--batches")]
        if min(batches, default=0) < 1:
            raise OptionError(f"normfx: --batches must be positive numbers, not {parsed.batches!r}")
        order = itertools.product(models, dtypes, batches, tasks)
        cells = [Cell(model, dtype, batch, task, parsed.device) for model, dtype, batch, task in order]
    if parsed.threads is not None and parsed.threads < 1:
        raise OptionError(f"normfx: --threads must be a positive number, not {parsed.threads}")
    if not parsed.dry_run:
        command.check(parsed.rounds, parsed.device)
    if parsed.graphs and torch.device(parsed.device).type != "cuda":
        raise OptionError(f"normfx: --graphs: CUDA graphs are of CUDA devices, not of {parsed.device}")
    return cells, [name for name in VARIANTS if name in variants]


def _results(parsed: argparse.Namespace, settings: Settings) -> Results:
    """New results, or under --resume those of an earlier run, if they are of the same machine and settings."""
    here = machine.describe(parsed.device)
    fresh = Results({**here, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}, settings)
    path = parsed.output / "bench.json"
    if not parsed.resume or not path.exists():
        return fresh
    old = Results.load(path.read_text())
    then, now = {**old.machine, **dataclasses.asdict(old.settings)}, {**here, **dataclasses.asdict(settings)}
    command.unchanged(path, then, now)
    return old


def _complete(measured: Measured | None, variants: Iterable[str]) -> bool:
    """Whether there is nothing left to measure; cells with failures are measured again."""
    return measured is not None and not measured.failures and set(variants) <= {*measured.results, *measured.skipped}


def _measured(cell: Cell, variants: list[str], settings: Settings, say: Callable[[str], None]) -> Measured:
    try:
        return measure(cell, variants, settings, lambda stage: say(f"{cell}: {stage}"))
    except Exception as error:  # a model that cannot be made, say: the run goes on
        return Measured(cell, failures={"cell": failure_text(error)})


def _warm_up(device: str) -> None:
    """Import the compiler, so that the first variant of the first cell does not pay for it."""
    x = torch.ones(2, device=device, requires_grad=True)
    torch.autograd.backward(torch.compile(lambda x: (x * x).sum())(x))


def _show(results: Results, console: Console) -> None:
    console.print(present.table(results))
    show(console, f"speed relative to {results.settings.base}, all cells", *present.summary(results))
    for line in present.remarks(results):
        console.print(line, highlight=False, markup=False)
    if not has_matplotlib():
        console.print(present.NO_MATPLOTLIB, markup=False)
