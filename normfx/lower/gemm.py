"""Which library multiplies by kept and frozen weights on a CPU.

Inductor's freezing packs half precision weights for oneDNN and float32 weights for MKL. Where oneDNN is the faster of
the two (on an AMD EPYC, rows × in × out = 128 × 768 × 2304: 2.1 against 3.4 ms, with pointwise ops fused after it on
top), the frozen variant is packed for oneDNN altogether.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from normfx.compat import onednn
from normfx.lower.measurements import Pair, least

FILE = "packed"
ROWS, IN, OUT = 128, 512, 1024
COPIES = 16
"""Packed weights that are multiplied by in turn where two packed forms are compared: no cache of two cores holds them
(2 MiB each), as none holds a model's. With one weight, which stays in the cache, oneDNN came out level with MKL on a
Xeon on which it is 1.04 to 1.18 times slower by weights from memory."""
CHANNELS, PLACES = 256, 14
"""The channels, and the places in each direction, of the 3 × 3 convolution that stands for all."""
REPEATS, SECONDS = 7, 0.15
"""Turns of each call at least, and for how long more are taken: other programs on the same cores slow most of them."""
MARGIN = 1.05


@contextmanager
def packing() -> Iterator[None]:
    """While a frozen variant is built: let Inductor pack float32 linears for the faster library."""
    if not onednn_is_faster():
        yield
        return
    with onednn.packing_for_onednn():
        yield


def onednn_is_faster() -> bool:
    """Whether a packed oneDNN linear is as fast as a packed MKL one in float32 here, or faster."""
    seconds = _packed_forms()
    return seconds is not None and seconds[1] / seconds[0] > 1 / MARGIN


def mkl_is_faster() -> bool:
    """Whether a packed MKL linear is the fastest in float32 here, of oneDNN's and ATen's `addmm`."""
    return _packed_forms() is not None and not onednn_is_faster() and mkl_speed() > MARGIN


@functools.cache
def _packed_forms() -> Pair | None:
    """Seconds of oneDNN's and of MKL's packed linear in float32, by weights from memory, measured by a few processes,
    in 0.2 s; None where one of them is missing."""
    mkl_backend: Any = torch.backends.mkl
    if not onednn_works(torch.float32) or not mkl_backend.is_available():
        return None
    with torch.inference_mode(False), torch.no_grad():
        x, weight, bias = layer(torch.float32)

        def both() -> Pair:
            own = [onednn.pack(weight, ROWS) for _ in range(COPIES)]
            other = [onednn.mkl_pack(weight, ROWS) for _ in range(COPIES)]
            return best(
                lambda: [onednn.linear(x, each, bias) for each in own],
                lambda: [onednn.mkl_linear(x, each, weight, bias, ROWS) for each in other],
            )

        return least(FILE, "float32 packed, oneDNN and MKL, weights from memory", both)


@functools.cache
def mkl_speed() -> float:
    """Speed of a packed MKL linear in float32 relative to ATen's `addmm` here, by weights from memory, measured like
    the others. MKL has to be there."""
    with torch.inference_mode(False), torch.no_grad():
        x, weight, bias = layer(torch.float32)

        def both() -> Pair:
            packed = [onednn.mkl_pack(weight, ROWS) for _ in range(COPIES)]
            plain = [weight.clone().t() for _ in range(COPIES)]
            return best(
                lambda: [onednn.mkl_linear(x, each, weight, bias, ROWS) for each in packed],
                lambda: [torch.addmm(bias, x, each) for each in plain],
            )

        mkl, plain = least(FILE, "float32, MKL packed and addmm, weights from memory", both)
        return plain / mkl


def packed_is_faster(dtype: torch.dtype) -> bool:
    """Whether a packed oneDNN linear beats ATen's `addmm` here."""
    return packed_speed(dtype) > MARGIN


def packed_speed(dtype: torch.dtype) -> float:
    """Speed of a packed oneDNN linear relative to ATen's `addmm` here, 0 where there is none."""
    packed, plain = _seconds(dtype)
    return plain / packed


@functools.cache
def gelu_is_faster(dtype: torch.dtype) -> bool:
    """Whether GELU is faster in the kernel of a packed product than by itself here; a few processes measure it."""
    if not onednn_works(dtype):
        return False
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight, bias = layer(dtype)
        packed, plain = onednn.pack(weight, ROWS), packed_product(x, weight, bias)
        calls = lambda: onednn.linear(x, packed, bias, True), lambda: torch.nn.functional.gelu(plain())
        inside, apart = least(FILE, f"{dtype}, GELU in the product and apart", lambda: best(*calls))
    return inside < apart


def packed_gain(dtype: torch.dtype) -> float:
    """Seconds that one multiply-add by packed weights saves here, 0 where they are not packed."""
    packed, plain = _seconds(dtype)
    if dtype == torch.float32 and mkl_is_faster():
        packed = min(packed, plain / mkl_speed())
    return (plain - packed) / (ROWS * IN * OUT) if plain / packed > MARGIN else 0.0


@functools.cache
def _seconds(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a packed oneDNN linear (infinity where there is none) and of ATen's `addmm`, measured by a few
    processes, in 0.2 s."""
    if not onednn_works(dtype):
        return float("inf"), 1.0
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight, bias = layer(dtype)
        calls = packed_product(x, weight, bias), lambda: torch.addmm(bias, x, weight.t())
        return least(FILE, f"{dtype}, packed and addmm", lambda: best(*calls))


def convolution_is_faster(dtype: torch.dtype) -> bool:
    """Whether a convolution by a kernel that oneDNN has packed beats ATen's here."""
    return convolution_speed(dtype) > MARGIN


@functools.cache
def convolution_speed(dtype: torch.dtype) -> float:
    """Speed of a convolution by a packed kernel relative to ATen's here, 0 where there is none, measured like the
    others."""
    if not onednn_works(dtype):
        return 0.0
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.ones(1, CHANNELS, PLACES, PLACES, dtype=dtype, device="cpu")
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype, device="cpu")
        how = ([1, 1], [1, 1], [1, 1], 1)
        packed = onednn.pack_convolution(weight, *how, None)
        calls = (lambda: onednn.convolution(x, packed, None, *how), lambda: _convolved(x, weight))
        own, plain = least(FILE, f"{dtype}, packed convolution and conv2d", lambda: best(*calls))
        return plain / own


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """As Inductor calls it: the kernel is stored channels last in each call."""
    return torch.conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding=1)


def onednn_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack a weight of this dtype on this processor, and multiply by it."""
    backend: Any = torch.backends.mkldnn
    if not backend.is_available() or not backend.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn.multiplies_bfloat16())


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device="cpu")  # whatever the default device is

    return ones(ROWS, IN), ones(OUT, IN), ones(OUT)


def packed_product(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """A call of oneDNN's linear, its weight packed beforehand."""
    packed = onednn.pack(weight, ROWS)
    return lambda: onednn.linear(x, packed, bias)


def best(one: Callable[[], object], other: Callable[[], object]) -> Pair:
    """Seconds of each call, the least of several turns."""
    best = [float("inf")] * 2
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= REPEATS and time.perf_counter() - start > SECONDS:
            break
        for i, call in enumerate((one, other)):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best[0], best[1]
