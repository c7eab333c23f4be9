"""`normfx survey`: what becomes of the norms of a zoo of published models, and why."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from normfx.bench import command
from normfx.bench.machine import version
from normfx.bench.output import show
from normfx.survey import present
from normfx.survey.family import Family
from normfx.survey.row import Row, row
from normfx.survey.zoo import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(FAMILIES), help="families, as --list names them", metavar="A,B")
    parser.add_argument("--list", action="store_true", help="name the families and do nothing")
    parser.add_argument(
        "--train", action="store_true", help="record gradients and plan as in training, folds being free"
    )
    parser.add_argument(
        "--defer", action="store_true", help="with the rule defer_norm, as if the means of all rows were small"
    )
    parser.add_argument("--output", type=Path, default=Path("normfx-survey"), metavar="DIR")
    parser.set_defaults(run=main, parser=parser)


def main(parsed: argparse.Namespace, families: Mapping[str, Family] = FAMILIES) -> int:
    """Survey the families that the arguments name and write what was found. Exit status 1: some failed.

    Raises OptionError for an unknown family, before anything is run.
    """
    console = command.console()
    chosen = [families[name] for name in command.words(parsed.models, "--models", "family", families)]
    if parsed.list:
        show(console, "families", ("name", "package", "depth"), [(f.name, f.package, f.depth) for f in chosen])
        return 0
    command.make_folder(parsed.output)
    rows = _surveyed(chosen, parsed, console)
    present.write(rows, versions(chosen), parsed.output)
    console.print(present.table(rows))
    present.summary(console, rows)
    console.print(f"written to {parsed.output}", highlight=False)
    return int(any(found.failure for found in rows))


def _surveyed(chosen: list[Family], parsed: argparse.Namespace, console: Console) -> list[Row]:
    """One row for each family. What the libraries say of random weights and small configurations is not shown."""
    rows = []
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with command.progress(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = progress.add_task("families", total=len(chosen), stage="")
        for family in chosen:
            progress.update(task, stage=family.name)
            rows.append(row(family, parsed.train, parsed.defer))
            progress.advance(task)
    return rows


def versions(chosen: list[Family]) -> dict[str, str | None]:
    """What the survey depends on: torch and the libraries of the families, as far as they are there."""
    return {name: version(name) for name in ("torch", *dict.fromkeys(family.package for family in chosen))}
