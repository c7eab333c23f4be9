"""The floor of a call: the time of its products alone, at the rate at which this machine multiplies large matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from normfx.bench.timing import seconds
from normfx.lower.gemm import onednn_works, packed_product

SIZE = 1024
ROUNDS = 15


def floor_ms(step: Callable[[], object], dtype: torch.dtype, device: str) -> float:
    """Milliseconds of the matrix products, convolutions and attention of a call, at the measured rate."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(1e3 * counter.get_total_flops() / rate(dtype, device))


@functools.cache
def rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a product of two square matrices: the best of several, and on the CPU
    of ATen and packed oneDNN, of bfloat16 also in float32: some processors multiply that faster."""
    with torch.no_grad():
        a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
        calls: list[Callable[[], object]] = [lambda: a @ b]
        if a.device.type == "cpu" and onednn_works(dtype):
            calls.append(packed_product(a, b, b[0]))
        best = min(seconds(call, 1, device) for _ in range(ROUNDS) for call in calls)
    own = float(2 * SIZE**3 / best)
    return max(own, rate(torch.float32, device)) if dtype == torch.bfloat16 and a.device.type == "cpu" else own
