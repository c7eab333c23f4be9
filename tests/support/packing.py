"""Models whose linear layers multiply by packed weights, however small they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import EagerBackend
from torch import Tensor, nn

from normfx.lower import gemm, joined, packed, packed_convolution, packing, rates

HAS_MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch was built without MKL")


def pack_all(monkeypatch: pytest.MonkeyPatch, mkl: bool = False) -> None:
    """Pack small weights too, whatever this machine is fast at, in the dtypes that its oneDNN can pack.

    mkl: float32 weights by MKL, where the number of rows is fixed
    """
    monkeypatch.setattr(packed, "packed_is_faster", gemm.onednn_works)
    monkeypatch.setattr(packed, "mkl_is_faster", lambda: mkl)
    monkeypatch.setattr(joined, "packed_is_faster", gemm.onednn_works)
    monkeypatch.setattr(rates, "plain_row_is_fast", lambda: False)
    monkeypatch.setattr(packing, "LEAST", dict.fromkeys(packing.LEAST, 1))
    monkeypatch.setattr(packed_convolution, "convolution_is_faster", gemm.onednn_works)
    monkeypatch.setattr(packed_convolution, "LEAST", 1)
    monkeypatch.setattr(packed_convolution, "PADDED", 1000)


def count(backend: EagerBackend) -> int:
    """Of the one graph."""
    return sum(rows_of(backend).values())


def rows_of(backend: EagerBackend) -> Counter[int]:
    """Count the products of the one graph by the rows that their weight is packed for; 0: any number, by oneDNN."""
    (module,) = backend.modules
    found = [node for node in module.graph.nodes if node.target is packed.PACKED_LINEAR]
    return Counter(int(node.args[4]) if len(node.args) > 4 else 0 for node in found)


class Reads(nn.Module):
    """A norm whose output is read by a packed linear layer, and multiplied in a way that is given."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.product, self.read = nn.LayerNorm(8), product, nn.Linear(8, 8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor) -> Any:
        return self.product(self.norm(x), self.weight, self.bias), self.read(self.norm(x))


linear = nn.functional.linear

PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {
    "linear": (lambda y, w, b: linear(y, w, b), 1),
    "no bias": (lambda y, w, b: linear(y, w), 1),
    "bias with a stride": (lambda y, w, b: linear(y, w, torch.stack([b, -b], 1)[:, 0]), 1),
    "bias of one number": (lambda y, w, b: linear(y, w, b[:1].expand(8)), 1),
    "bias of an activation": (lambda y, w, b: linear(y, w, torch.tanh(y).mean((0, 1)).flip(0)), 1),
    "one after the other": (lambda y, w, b: (lambda first: linear(first, w, b) + first)(linear(y, w)), 2),
    "a product of parameters as weight": (lambda y, w, b: linear(y, torch.tanh(linear(w, w))), 1),
    "addmm": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w), 1),
    "addmm of a transpose": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w.t()), 1),
    "scaled addmm": (lambda y, w, b: torch.addmm(b, y.flatten(0, 1), w, alpha=2), 0),
    "addmm with a matrix": (lambda y, w, b: torch.addmm(b.expand(15, 8), y.flatten(0, 1), w), 0),
    "used twice": (lambda y, w, b: linear(torch.tanh(linear(y, w, b)), w), 2),
    "input transposed": (lambda y, w, b: linear(torch.tanh(y).transpose(0, 1), w, b), 1),
    "input broadcast": (lambda y, w, b: linear(torch.tanh(y)[:, :1].expand(3, 4, 8), w, b), 1),
    "no rows": (lambda y, w, b: linear(y[:0], w, b), 1),
    "one dimension": (lambda y, w, b: linear(torch.tanh(y)[0, 0], w, b), 0),
    "weight is an activation": (lambda y, w, b: linear(y, torch.tanh(y[0, :4]) @ w), 0),
    "view of the weight returned": (lambda y, w, b: (linear(torch.tanh(y), w, b), w.t()), 0),
    "weight written": (lambda y, w, b: linear(torch.tanh(y), w.mul_(1.0), b), 0),
}
