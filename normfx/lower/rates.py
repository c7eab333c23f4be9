"""Which library multiplies two float32 matrices faster on this machine: measured once for each class of shapes.

A class has sizes rounded to powers of two and the layouts of both operands; rows and columns of large products count as
fewer, which changes the time but hardly the rate. What was measured is kept in Inductor's cache folder, under the
processor, the number of threads and the version of torch; another process reads it there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir  # private; torch 2.11 to 2.15
from torch.utils._python_dispatch import _disable_current_modes

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
    return torch.ops.mkldnn._linear_pointwise.default


def onednn_is_faster(product: Product) -> bool:
    """Whether oneDNN beats ATen at products of this class, by MARGIN."""
    of_class = _class(product)
    key = " ".join(map(str, map(int, of_class)))
    with _lock:
        known = _read()
        if key not in known:
            known[key] = _measure(of_class)
            _write(known)
        return known[key] >= MARGIN


def measured() -> dict[Product, float]:
    """What is known of this machine: for each class, ATen's time divided by oneDNN's."""
    with _lock:
        numbers = {tuple(map(int, key.split())): ratio for key, ratio in _read().items()}
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


_lock = threading.RLock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))

_known: dict[Path, dict[str, float]] = {}


def _path() -> Path:
    machine = (platform.processor(), _processor(), torch.__version__, torch.get_num_threads())
    return Path(cache_dir()) / "normfx" / f"products-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"


@functools.cache
def _processor() -> str:
    """The model and the instruction sets of the processor, as far as torch and the system tell."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return capability
    return capability + next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")


def _read() -> dict[str, float]:
    path = _path()
    if path not in _known:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        _known[path] = {k: v for k, v in found.items() if isinstance(v, float)} if isinstance(found, dict) else {}
    return _known[path]


def _write(known: dict[str, float]) -> None:
    """Replace the file as a whole; a folder that cannot be written to costs the next process its own measurement."""
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, path)
    except OSError:
        return


def _measure(product: Product) -> float:
    """ATen's time divided by oneDNN's, best of several interleaved rounds."""
    rows, inner, columns, a_transposed, b_transposed = product
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
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
