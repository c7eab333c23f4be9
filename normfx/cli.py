"""The `normfx` command. What a command needs is imported when that command is given: help is there at once."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from normfx.errors import NormfxError

COMMANDS = {
    "demo": ("normfx.demo", "GPT-2 with random weights: report, error against float64, time"),
    "explain": ("normfx.explain_command", "what becomes of each norm of a model, and why; compiles nothing"),
    "doctor": ("normfx.doctor", "what normfx finds on this machine, and what to fix"),
    "bench": ("normfx.bench", "time, error and memory of models under eager, Inductor and normfx"),
    "survey": ("normfx.survey", "what becomes of the norms of a zoo of published models, and why"),
}
"""Module and summary of each command. The module has `add_arguments(parser)`, which sets `run` and `parser`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="normfx", description="LayerNorm to RMSNorm, exactly, under torch.compile.")
    version = f"normfx {importlib.metadata.version('normfx')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if given[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(given)
    own: argparse.ArgumentParser = parsed.parser
    names = own.prog.split()[1:]
    if given[: len(names)] != names:
        # argparse would drop them in silence
        own.error(f"its options go after its name: {own.prog} …")
    try:
        return int(parsed.run(parsed))
    except NormfxError as error:
        own.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
