"""Times and errors of attention, torch's kernel and that of normfx, interleaved: a table in Markdown."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normfx.compat.attention import attend
from normfx.lower.attention import ATTENTION

ROUNDS = 25
SHAPES = (  # sequences, heads, queries, keys, width, kind
    (1, 6, 197, 197, 64, "all keys"),
    (8, 6, 197, 197, 64, "all keys"),
    (1, 6, 256, 256, 64, "causal mask"),
    (8, 6, 256, 256, 64, "causal mask"),
    (1, 20, 256, 256, 16, "all keys"),
    (64, 3, 49, 49, 32, "all keys"),
    (1, 8, 1024, 1024, 128, "causal mask"),
    (1, 8, 4096, 4096, 64, "window of 256"),
    (1, 12, 1, 1024, 64, "all keys"),
)


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "all keys":
        return None
    seen = torch.ones(queries, keys).tril().bool()
    if kind.startswith("window"):
        seen &= ~torch.ones(queries, keys).tril(-256).bool()
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(~seen, float("-inf"))


def timed(calls: list[Callable[[], Any]]) -> list[list[float]]:
    """Milliseconds of each call in each round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            call()
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    torch.manual_seed(0)
    print("| sequences × heads, queries × keys, width | | dtype | torch | normfx | speed | error, of torch's |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for sequences, heads, queries, keys, width, kind in SHAPES:
            q, k, v = (torch.randn(sequences, n, heads, width).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
            mask = mask_of(kind, queries, keys, dtype)
            calls = [partial(run, q, k, v, mask, False, None) for run in (attend, ATTENTION)]
            theirs, own = timed(calls)
            scores = q.double() @ k.double().mT * width**-0.5
            exact = (scores if mask is None else scores + mask.double()).softmax(-1) @ v.double()
            errors = [float((call()[0] - exact).norm()) for call in calls]
            ratios = sorted(a / b for a, b in zip(theirs, own, strict=True))
            low, middle, high = (ratios[round(p * (len(ratios) - 1))] for p in (0.25, 0.5, 0.75))
            print(
                f"| {sequences} × {heads}, {queries} × {keys}, {width} | {kind} | {str(dtype)[6:]} "
                f"| {statistics.median(theirs):.3g} | {statistics.median(own):.3g} "
                f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {errors[1] / errors[0]:.2f} |"
            )


if __name__ == "__main__":
    main()
