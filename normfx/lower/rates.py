"""How two matrices are multiplied faster on this machine: measured once for each class of shapes.

Float32 matrices by ATen or by oneDNN, bfloat16 ones as they are or in float32.

A class has sizes rounded to powers of two and the layouts of both operands; rows and columns of large products count as
fewer, which changes the time but hardly the rate. Few rows, as when a model decodes a token at a time, take as long as
reading the other matrix from memory: they are multiplied by one copy of it after another, more than caches hold.
What was measured is kept for other processes (measurements.py).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normfx.compat.onednn import linear, pack
from normfx.compat.tracing import disable_current_modes
from normfx.lower import measurements

FILE = "products"

ROUNDS = 7
SECONDS = 0.2
"""A class is measured for at most so many rounds, and after the third one for at most so long."""

MARGIN = 1.05

FILE_WIDE = "wide-products"
WIDE_MARGIN = 1.1
"""A product of bfloat16 matrices in float32 has to be so much faster: it takes memory for three float32 matrices."""

FILE_ROW = "row"
ROW_IN, ROW_OUT = 1024, 4096
ROW_MARGIN = 1.1
"""A plain weight may be so much slower than a packed one: it takes no memory."""

MOST = 2**32
"""Floating-point operations of the largest product that is measured."""

FEW_ROWS = 16
"""Up to so many rows, what limits a product is reading the other matrix from memory."""

MOST_READ = 2**23
"""Entries of the largest matrix that is measured with few rows."""

READ_BYTES = 2**26
"""Bytes of its copies together: more than the caches of two cores hold."""


class Product(NamedTuple):
    """The product of a rows × inner and an inner × columns matrix. Transposed: columns are contiguous, not rows."""

    rows: int
    inner: int
    columns: int
    a_transposed: bool
    b_transposed: bool


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product, plus a vector for each row, by oneDNN; strides as they come."""
    return linear(a, b.t(), bias)


def wide(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of bfloat16 matrices, plus a vector for each row, in float32 by oneDNN, rounded once."""
    return onednn(a.float(), b.float(), None if bias is None else bias.float()).bfloat16()


def onednn_is_faster(product: Product) -> bool:
    """Whether oneDNN beats ATen at float32 products of this class, by MARGIN."""
    return _ratio(FILE, product, lambda of_class: _measure(of_class)) >= MARGIN


def wide_is_faster(product: Product) -> bool:
    """Whether bfloat16 products of this class are faster in float32, casts included, by WIDE_MARGIN."""
    return _ratio(FILE_WIDE, product, lambda of_class: _measure(of_class, torch.bfloat16, wide)) >= WIDE_MARGIN


def _ratio(file: str, product: Product, measure: Callable[[Product], measurements.Pair]) -> float:
    """ATen's time divided by that of another way to multiply, for products of this class; measured by one process."""
    of_class = _class(product)
    key = " ".join(map(str, map(int, of_class)))
    plain, own = measurements.least(file, key, lambda: measure(of_class), processes=1)
    return plain / own


def measured() -> dict[Product, float]:
    """What is known of this machine: for each class, ATen's time divided by oneDNN's."""
    with measurements.LOCK:
        known = measurements.read(FILE).items()
        pairs = ((key, found) for key, found in known if isinstance(found, list) and len(found) == 4)
        numbers = {tuple(map(int, key.split())): plain / own for key, (plain, own, *_) in pairs}
    return {Product(r, i, c, bool(ta), bool(tb)): ratio for (r, i, c, ta, tb), ratio in numbers.items()}


def _class(product: Product) -> Product:
    rows, inner, columns = (1 << round(math.log2(size)) for size in (product.rows, product.inner, product.columns))
    few = rows <= FEW_ROWS
    while 2 * rows * inner * columns > MOST or (few and inner * columns > MOST_READ):
        largest = max(rows, columns)
        if largest <= 512:
            inner //= 2
        elif rows == largest:
            rows //= 2
        else:
            columns //= 2
    return product._replace(rows=rows, inner=inner, columns=columns)


def _measure(
    product: Product, dtype: torch.dtype = torch.float32, other: Callable[[Tensor, Tensor], Tensor] = onednn
) -> measurements.Pair:
    """Seconds of ATen's product and of the other."""
    rows, inner, columns, a_transposed, b_transposed = product
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        a = _matrix(rows, inner, a_transposed, dtype)
        count = math.ceil(READ_BYTES / (a.element_size() * inner * columns)) if rows <= FEW_ROWS else 1
        copies = [_matrix(inner, columns, b_transposed, dtype) for _ in range(count)]
        return _best(lambda: _each(torch.mm, a, copies), lambda: _each(other, a, copies))


@functools.cache
def plain_row_is_fast() -> bool:
    """Whether oneDNN multiplies one row by a weight as it is as fast as by a packed one; a few processes measure it."""
    with disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        row = _matrix(1, ROW_IN, False)
        count = READ_BYTES // (4 * ROW_IN * ROW_OUT)

        def both() -> measurements.Pair:
            weights = [_matrix(ROW_OUT, ROW_IN, False) for _ in range(count)]
            packed = [pack(weight, 1) for weight in weights]
            return _best(lambda: _each(_linear, row, packed), lambda: _each(_linear, row, weights))

        packed, plain = measurements.least(FILE_ROW, "float32 row, packed and plain", both)
        return packed / plain > 1 / ROW_MARGIN


def _each(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, matrices: Sequence[Tensor]) -> None:
    for matrix in matrices:
        multiply(a, matrix)


def _linear(row: Tensor, weight: Tensor) -> Tensor:
    return linear(row, weight, None)


def _best(*calls: Callable[[], None]) -> tuple[float, float]:
    """Seconds of each of two calls, the least of several interleaved rounds."""
    best = [float("inf")] * 2
    begin = time.perf_counter()
    for done in range(ROUNDS):
        if done >= 3 and time.perf_counter() - begin > SECONDS:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]


def _matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones, whatever the default device and dtype are."""
    shape = (columns, rows) if transposed else (rows, columns)
    made = torch.ones(shape, dtype=dtype, device="cpu")
    return made.t() if transposed else made
