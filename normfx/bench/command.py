"""What the commands of `normfx bench` share: reading their arguments, progress, results of an earlier run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from normfx.errors import OptionError


def words(text: str, option: str, what: str = "", valid: Iterable[str] = ()) -> list[str]:
    """The words between commas, each once. Raises OptionError for one that is not `valid`, if they have a kind."""
    found = [w.strip() for w in text.split(",") if w.strip()]
    for word in found:
        if what and word not in valid:
            raise OptionError.unknown(what, word, valid, option)
    return list(dict.fromkeys(found))


def check(rounds: int | None, device: str) -> None:
    """Raises OptionError where there would be no quartiles, or nothing to measure on."""
    if rounds is not None and rounds < 2:
        raise OptionError("normfx: --rounds must be 2 or more: one round has no quartiles")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise OptionError(f"normfx: --device {device}: torch knows no such device; use cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"normfx: --device {device}: torch sees no CUDA device")


def use(device: str) -> None:
    """Make a CUDA device the current one. "cuda" is the current one already, and torch.cuda.set_device refuses it."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen.index)


def make_folder(output: Path) -> None:
    """Make the folder of `--output`. Raises OptionError where that fails, before anything is measured."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"normfx: --output {output}: {error.strerror}") from error


def deadline(minutes: float | None) -> float:
    """The time, as time.monotonic counts, at which no cell is begun any more. Raises OptionError for 0 and less."""
    if minutes is None:
        return float("inf")
    if not minutes > 0:
        raise OptionError(f"normfx: --minutes must be a positive number, not {minutes:g}")
    return time.monotonic() + 60 * minutes


def unchanged(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises OptionError if results in `path` are of another machine or other settings than now."""
    different = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]]
    if different:
        raise OptionError(f"normfx: --resume: {path} was measured otherwise: {'; '.join(different)}")


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=120)  # else 80, which breaks the tables' lines


def progress(shown: Console) -> Progress:
    """A bar whose tasks have a field `stage`; nothing where the output is no terminal."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[stage]}"))
    return Progress(*columns, console=shown, disable=not shown.is_terminal)
