"""`normfx demo`: GPT-2 with random weights through the whole path, on the CPU."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from normfx.bench.models import Logits, perturbed
from normfx.bench.timing import interleaved, relative_error, speeds
from normfx.errors import NormfxError
from normfx.explaining import explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a two-layer model, seconds instead of a minute")
    parser.set_defaults(run=main, parser=parser)


def main(parsed: argparse.Namespace) -> int:
    """Run the demo. Raises NormfxError where transformers is missing."""
    if parsed.quick:
        run(layers=2, width=128, batch=2, tokens=64, repeats=15)
    else:
        run()
    return 0


def run(layers: int = 6, width: int = 384, batch: int = 4, tokens: int = 256, repeats: int = 21) -> None:
    """Print the report, the error against float64 next to eager's own, and the time relative to plain Inductor.

    Needs `transformers`. Times are medians of interleaved forward calls without gradients, in float32; the spread is
    the interquartile range of the per-round ratios.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # an extra: only the demo needs it
    except ImportError as error:
        raise NormfxError("normfx: the demo needs transformers: pip install 'normfx[demo]'") from error
    console = Console()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=tokens, use_cache=False)
    model = perturbed(Logits(GPT2LMHeadModel(config), ("input_ids",)))
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    with torch.no_grad():
        console.print(f"GPT-2, {layers} layers of width {width}, batch {batch} x {tokens} tokens, float32, CPU\n")
        console.print(explain(model)(ids))
        console.print("\ncompiling with Inductor and with normfx …")
        calls: dict[str, Callable[..., Any]] = {
            "eager": model,
            "inductor": torch.compile(model, fullgraph=True),
            "normfx": torch.compile(model, backend="normfx", fullgraph=True),
        }
        exact = copy.deepcopy(model).double()(ids)
        errors = {name: relative_error([call(ids)], [exact]) for name, call in calls.items()}
        times = interleaved({name: partial(call, ids) for name, call in calls.items()}, repeats)
    console.print(_table(errors, times))
    console.print(
        "normfx keeps folded weights between calls and checks in each call that no parameter changed (docs/folds.md)."
    )


def _table(errors: dict[str, float], times: dict[str, list[float]]) -> Table:
    table = Table("", "error against float64", "median ms", "speed relative to Inductor (quartiles)")
    for name, seconds in times.items():
        low, middle, high = speeds(times["inductor"], seconds)
        table.add_row(
            name,
            f"{errors[name]:.2e}",
            f"{1e3 * statistics.median(seconds):.1f}",
            f"{middle:.2f}x ({low:.2f} to {high:.2f})",
        )
    return table
