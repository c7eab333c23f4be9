"""Which library multiplies two float32 matrices faster on this machine: measured once for each class of shapes.

A class has sizes rounded to powers of two and the layouts of both operands; rows and columns of large products count as
fewer, which changes the time but hardly the rate. What was measured is kept for other processes (measurements.py).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfx.compat.onednn import linear
from normfx.compat.tracing import disable_current_modes
from normfx.lower import measurements

FILE = "products"

ROUNDS = 7
SECONDS = 0.2
"""A class is measured for at most so many rounds, and after the third one for at most so long."""

MARGIN = 1.05

MOST = 2**32
"""Floating-point operations of the largest product that is measured."""


class Product(NamedTuple):
    """The product of a rows × inner and an inner × columns matrix. Transposed: columns are contiguous, not rows."""

    rows: int
    inner: int
    columns: int
    a_transposed: bool
    b_transposed: bool


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product, plus a vector for each row, by oneDNN; strides as they come."""
    result: Tensor = _multiply()(a, b.t(), bias, "none", [], "")
    return result


@functools.cache
def _multiply() -> Any:
    return linear()


def onednn_is_faster(product: Product) -> bool:
    """Whether oneDNN beats ATen at products of this class, by MARGIN."""
    of_class = _class(product)
    key = " ".join(map(str, map(int, of_class)))
    with measurements.LOCK:
        known = measurements.read(FILE)
        if not isinstance(known.get(key), float):
            known[key] = _measure(of_class)
            measurements.write(FILE, known)
        ratio: float = known[key]
        return ratio >= MARGIN


def measured() -> dict[Product, float]:
    """What is known of this machine: for each class, ATen's time divided by oneDNN's."""
    with measurements.LOCK:
        known = measurements.read(FILE).items()
        numbers = {tuple(map(int, key.split())): ratio for key, ratio in known if isinstance(ratio, float)}
    return {Product(r, i, c, bool(ta), bool(tb)): ratio for (r, i, c, ta, tb), ratio in numbers.items()}


def _class(product: Product) -> Product:
    rows, inner, columns = (1 << round(math.log2(size)) for size in (product.rows, product.inner, product.columns))
    while 2 * rows * inner * columns > MOST:
        largest = max(rows, columns)
        if largest <= 512:
            inner //= 2
        elif rows == largest:
            rows //= 2
        else:
            columns //= 2
    return product._replace(rows=rows, inner=inner, columns=columns)


def _measure(product: Product) -> float:
    """ATen's time divided by oneDNN's, best of several interleaved rounds."""
    rows, inner, columns, a_transposed, b_transposed = product
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        a = _matrix(rows, inner, a_transposed)
        b = _matrix(inner, columns, b_transposed)
        rivals: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.mm, onednn)
        best = [float("inf")] * 2
        begin = time.perf_counter()
        for done in range(ROUNDS):
            if done >= 3 and time.perf_counter() - begin > SECONDS:
                break
            for i, multiply in enumerate(rivals):
                start = time.perf_counter()
                multiply(a, b)
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]


def _matrix(rows: int, columns: int, transposed: bool) -> Tensor:
    """Ones, whatever the default device and dtype are."""
    shape = (columns, rows) if transposed else (rows, columns)
    made = torch.ones(shape, dtype=torch.float32, device="cpu")
    return made.t() if transposed else made
