"""Random search for stale folds: sequences of writes between calls of several compiled callables over several models.

Each sequence is compared with eager mode after every call. The compiled graphs are run as they are, without Inductor:
what is searched is what the fold store believes. `python tests/support/store_fuzz.py --start 0 --count 5000`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from folding import Net
from store_steps import CALLABLES, STEPS, State, call

from normfx.lower import constants, folded
from normfx.weights import native


def _callables(fold: str) -> list[Callable[[Net, Tensor], Tensor]]:
    """Two compiled functions, each with a graph per shape of its inputs, so that four graphs share folds."""
    options = {"fold": fold, "strict": True}

    def one(model: Net, x: Tensor) -> Tensor:
        return model(x)

    def two(model: Net, x: Tensor) -> Tensor:
        return 2 * model(x) / 2

    return [torch.compile(f, backend="normfx", dynamic=False, options=options) for f in (one, two)]


@contextmanager
def without_inductor() -> Iterator[None]:
    """Graphs run as they are, so that a frozen variant takes milliseconds to build."""

    def run(gm: Any, example_inputs: Any, patches: Any) -> Any:
        return gm

    def run_frozen(gm: torch.fx.GraphModule, *rest: Any) -> Callable[..., Any]:
        return run(constants.with_constants(gm, {}), *rest)  # the builder empties its own module

    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    kept_without = mock.patch.object(folded, "compile_graph", run)
    frozen_without = mock.patch.object(constants, "compile_graph", run_frozen)
    with limits, kept_without, frozen_without, mock.patch.object(folded, "REFREEZE_AFTER", 3):
        torch._dynamo.reset()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        CALLABLES.update({fold: _callables(fold) for fold in ("cached", "frozen")})
        try:
            yield
        finally:
            CALLABLES.clear()
            dist.destroy_process_group()
            torch._dynamo.reset()


def run_sequence(seed: int) -> None:
    """One sequence. Raises AssertionError, with the steps so far, where a call differs from eager mode."""
    state = State(seed, frozen=seed % 3 == 0)
    library = native.native_library()
    assert library is not None
    library.normfx_allow_pages(seed % 4 != 0)
    try:
        with torch.no_grad():
            for _ in range(state.random.randrange(4, 16)):
                name = state.random.choice([*STEPS, *["call"] * len(STEPS)])
                state.trace.append(name)
                (call if name == "call" else STEPS[name])(state)
            call(state)
    except Exception as error:
        raise AssertionError(f"sequence {seed}: {error!r} after {', '.join(state.trace)}") from error
    finally:
        library.normfx_allow_pages(1)
        state.folder.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    failed = 0
    with without_inductor():
        for seed in range(arguments.start, arguments.start + arguments.count):
            try:
                run_sequence(seed)
            except AssertionError as error:
                failed += 1
                print(error)
    print(f"{arguments.count} sequences, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
