"""Which library multiplies by frozen float32 weights on a CPU.

Inductor's freezing packs half precision weights for oneDNN and float32 weights for MKL. Where oneDNN is the faster of
the two (on an AMD EPYC, rows × in × out = 128 × 768 × 2304: 2.1 against 3.4 ms, with pointwise ops fused behind it on
top), the frozen variant is packed for oneDNN altogether.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ROWS, IN, OUT = 128, 512, 1024
REPEATS = 7
MARGIN = 1.05


@contextmanager
def packing() -> Iterator[None]:
    """While a frozen variant is built: let Inductor pack float32 linears for the faster library."""
    if not onednn_is_faster():
        yield
        return
    from torch._inductor.fx_passes import mkldnn_fusion  # private; torch 2.11 to 2.15

    mkldnn_fusion._mkldnn_fusion_init()  # it asks the same question, once, about something else
    ops: Any = torch.ops.mkldnn
    asked = ops._is_mkldnn_acl_supported
    # what Inductor asks to choose oneDNN for float32 (Arm's Compute Library is a backend of oneDNN)
    ops._is_mkldnn_acl_supported = lambda: True
    try:
        yield
    finally:
        ops._is_mkldnn_acl_supported = asked


@functools.cache
def onednn_is_faster() -> bool:
    """Whether a packed oneDNN linear beats a packed MKL one in float32 here; measured once a process, in 50 ms."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.mkl]
    if not all(backend.is_available() for backend in backends) or not torch.backends.mkldnn.enabled:
        return False
    with torch.inference_mode(False), torch.no_grad():
        x, weight, bias = torch.ones(ROWS, IN), torch.ones(OUT, IN), torch.ones(OUT)
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS)
        variants: list[Callable[[], Tensor]] = [
            lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, bias, "none", [], ""),
            lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, bias, ROWS),
        ]
        best = [float("inf")] * 2
        for _ in range(REPEATS):
            for i, call in enumerate(variants):
                begin = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - begin)
    return best[0] * MARGIN < best[1]
