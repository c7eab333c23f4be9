"""Many random programs, fast: each is traced once, without Dynamo, and its rewritten graph is compared with eager.

    python tests/support/fuzz.py --first 0 --count 10000
    python tests/support/fuzz.py --dynamo --count 300

With --dynamo they are traced as by `torch.compile`, with steps that only this brings (border_programs.py), and the
canonical graph is run even where no rule applies.

Outputs and every gradient are compared in float64; where folds are kept, outputs without gradients. A program is a
function of its number alone: any failure can be run again by its number. The settings go round: the default rules, kept
folds, streams compressed in either basis, or norms deferred into their readers. Prints progress and the steps of each
failing program; the exit status is 1 if any fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from equivalence import assert_same_float64, assert_same_results, outputs_and_grads
from programs import BORDERS, BREAKING_OPS, OBSERVERS, STREAM_OPS, Program, Step, tokens
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from normfx.backend import forced, transform_canonical
from normfx.capture.cleanup import drop_dead_code, simplify_constants
from normfx.capture.sources import Source
from normfx.capture.trace import Captured
from normfx.lower.folded import fed
from normfx.lower.outside import keep_folds_outside
from normfx.options import Options
from normfx.report import GraphReport, Report

COUNT = 2000
"""Programs of one run."""

OPS = (*STREAM_OPS, *STREAM_OPS, *BREAKING_OPS, *OBSERVERS)
COMPRESSED = {"rules": "default,+crms_norm", "crms_width": "exact"}
SETTINGS: tuple[Mapping[str, str], ...] = (
    {},
    {"fold": "cached"},
    {**COMPRESSED, "crms_basis": "drop"},
    {**COMPRESSED, "crms_basis": "orthonormal"},
    {"rules": "default,+defer_norm", "defer_means": "small"},
    {"rules": "defer_norm,crms_norm,fold_batch_norm", "defer_means": "small", "crms_width": "exact"},
)


def program(number: int, dynamo: bool = False) -> tuple[Step, ...]:
    """The steps of a random program."""
    draw = random.Random(number)
    ops = OPS + BORDERS * 4 if dynamo else OPS
    return tuple((draw.choice(ops), draw.choice((0, 0, 0, 1, 2, 3))) for _ in range(draw.randint(2, 10)))


def capture_program(model: nn.Module, inputs: Sequence[Tensor]) -> Captured:
    """The canonical graph of a model, whose parameters become its first inputs."""
    parameters = dict(model.named_parameters())
    names = list(parameters)

    def call(*flat: Tensor) -> Any:
        return functional_call(model, dict(zip(names, flat, strict=False)), flat[len(names) :])

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x, static_shapes=True) for x in (*parameters.values(), *inputs)]
    with mode:
        gm = make_fx(call, pre_dispatch=True)(*fakes)
    simplify_constants(gm)
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, node.target)
        node.meta.setdefault("val", mode.from_tensor(value, static_shapes=True))
    drop_dead_code(gm.graph)
    gm.recompile()
    sources = {}
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        known = i < len(names)
        sources[node] = Source("parameter" if known else "input", names[i] if known else node.name, known)
    for node in gm.graph.find_nodes(op="get_attr"):
        sources[node] = Source("constant", str(node.target))
    return Captured(gm, sources)


def check(steps: tuple[Step, ...], options: Mapping[str, str]) -> GraphReport:
    """Outputs and gradients of a program's rewritten graph equal eager's; outputs alone where folds are kept."""
    torch.manual_seed(len(steps))
    with torch.set_grad_enabled(options.get("fold") != "cached"):
        report = _check(steps, options)
    for site in report.sites:
        assert site.rules or site.refusals
    return report


def _check(steps: tuple[Step, ...], options: Mapping[str, str]) -> GraphReport:
    model, inputs = Program(steps).eval().double(), (tokens(),)
    captured = capture_program(model, inputs)
    settings = Options.parse({"strict": True, "fold": "live", **options}, environ={})
    _, report = transform_canonical(captured, settings)
    kept = settings.fold == "cached"
    folding = keep_folds_outside(captured, settings, False, False, {}, lambda dtype: False)[0] if kept else None
    forward = captured.graph_module.forward
    run = fed(forward, folding) if folding is not None else forward
    flat = list(model.parameters())
    expected = outputs_and_grads(model, model, inputs)
    actual = outputs_and_grads(lambda *a: run(*flat, *a), model, inputs)
    assert_same_results(*expected, *actual, floor=1.0)
    return report


def check_by_dynamo(steps: tuple[Step, ...], options: Mapping[str, str]) -> Report:
    """The same for a program that Dynamo traces; the canonical graph is run in any case."""
    torch.manual_seed(len(steps))
    with forced(), torch.set_grad_enabled(options.get("fold") != "cached"):
        return assert_same_float64(Program(steps).eval(), (tokens(),), options, floor=1.0)


def run(first: int, count: int, every: int = 500, dynamo: bool = False) -> list[int]:
    """Check programs by number; returns those that fail. Prints each failure's steps, and progress."""
    failed: list[int] = []
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for number in range(first, first + count):
        steps, options = program(number, dynamo), SETTINGS[number % len(SETTINGS)]
        try:
            report = (check_by_dynamo if dynamo else check)(steps, options)
        except Exception as error:  # of whatever kind: the search goes on
            failed.append(number)
            print(f"program {number} {dict(options)}: {steps}\n    {type(error).__name__}: {error}", flush=True)
            continue
        counts["norms"] += len(report.sites)
        counts.update(rule for site in report.sites for rule in site.rules)
        if (number + 1 - first) % every == 0:
            rate = (time.perf_counter() - begin) / (number + 1 - first)
            print(f"{number + 1 - first} programs, {len(failed)} failed, {rate:.3f} s each; {dict(counts)}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--count", type=int, default=COUNT, help="how many programs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dynamo", action="store_true", help="trace them as torch.compile does")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    failed = run(given.first, given.count, dynamo=given.dynamo)
    print(f"{given.count} programs from {given.first}: {len(failed)} failed {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
