"""The `normfx` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from normfx import bench, demo, survey
from normfx.errors import NormfxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="normfx", description="LayerNorm to RMSNorm, exactly, under torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("demo", help="GPT-2 with random weights: report, error against float64, time")
    show.add_argument("--quick", action="store_true", help="a two-layer model, seconds in place of a minute")
    compare = commands.add_parser("bench", help="time, error and memory of models under eager, Inductor and normfx")
    bench.add_arguments(compare)
    zoo = commands.add_parser("survey", help="what becomes of the norms of a zoo of published models, and why")
    survey.add_arguments(zoo)
    given = sys.argv[1:] if arguments is None else arguments
    parsed = parser.parse_args(given)
    if parsed.command == "demo":
        if parsed.quick:
            demo.run(layers=2, width=128, batch=2, tokens=64, repeats=15)
        else:
            demo.run()
        return 0
    own: argparse.ArgumentParser = parsed.parser
    if parsed.command == "bench" and own is not compare and given[1] not in bench.OTHERS:
        # argparse would drop them in silence
        own.error(f"its options go behind its name: {own.prog} …")
    try:
        return int(parsed.run(parsed))
    except NormfxError as error:
        own.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
