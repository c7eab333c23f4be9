"""Weights that are stored in fewer bits than they are computed in stay so; what only looks like it is folded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, nn
from torch.nn import functional as F

from normfx.graph.nodes import op_name
from normfx.graph.packing import packed_sources
from normfx.report import Report

WIDTH = 16
Compose = Callable[["Coded"], Tensor]


class Coded(nn.Module):
    """x + λ ⊙ (W norm(x)), then a norm read by a linear; W is made by `compose`."""

    codes: Tensor
    nibbles: Tensor
    words: Tensor
    narrow: Tensor
    flags: Tensor
    zeros: Tensor
    places: Tensor
    order: Tensor

    def __init__(self, compose: Compose, scaled: bool = False) -> None:
        super().__init__()
        draw, d = torch.Generator().manual_seed(0), WIDTH
        integers: Callable[..., Tensor] = lambda low, high, *size: torch.randint(low, high, size, generator=draw)  # noqa: E731
        self.compose, self.scaled = compose, scaled
        self.table, self.norm, self.final, self.head = (
            nn.Embedding(10, d), nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 3)
        )  # fmt: skip
        self.weight, self.scale = nn.Parameter(torch.randn(d, d, generator=draw)), nn.Parameter(torch.full((d,), 0.02))
        self.left, self.right = nn.Parameter(torch.ones(d, 2)), nn.Parameter(torch.ones(2, d))
        self.values, self.lookup = nn.Parameter(torch.ones(20)), nn.Parameter(torch.randn(16, generator=draw))
        self.register_buffer("codes", integers(-127, 127, d, d).to(torch.int8))
        self.register_buffer("nibbles", integers(0, 255, d, d // 2).to(torch.uint8))
        self.register_buffer("words", integers(0, 2**31, d, d // 8).int())
        self.register_buffer("narrow", torch.randn(d, d, generator=draw).to(torch.float8_e4m3fn))
        self.register_buffer("flags", integers(0, 2, d, d) > 0)
        self.register_buffer("zeros", integers(-3, 3, d, 1).to(torch.int8))
        self.register_buffer("places", torch.randperm(d * d, generator=draw)[:20])
        self.register_buffer("order", torch.randperm(d, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        write = F.linear(self.norm(x), self.compose(self))
        x = x + (write * self.scale if self.scaled else write)
        return self.head(self.final(x))


def _column(vector: Tensor) -> Tensor:
    return vector[:, None]


def _halves(m: Coded) -> Tensor:
    return torch.stack([m.nibbles & 15, m.nibbles >> 4], -1).reshape(WIDTH, WIDTH).to(m.scale.dtype) * _column(m.scale)


def _words(m: Coded) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    unpacked = torch.bitwise_and(torch.bitwise_right_shift(m.words[..., None].expand(-1, -1, 8), shifts), 15)
    return (unpacked.reshape(WIDTH, WIDTH) - m.zeros).to(m.scale.dtype) * _column(m.scale)


PACKED: dict[str, Compose] = {
    "cast": lambda m: m.codes.to(m.scale.dtype),
    "scaled rows": lambda m: m.codes * _column(m.scale),
    "zero point": lambda m: (m.codes.to(m.scale.dtype) - m.zeros) * _column(m.scale),
    "two in a byte": _halves,
    "eight in a word": _words,
    "codes of a table": lambda m: m.lookup[(m.codes.int() & 15).long()] * _column(m.scale),
    "8-bit floats": lambda m: m.narrow.to(m.scale.dtype) * _column(m.scale),
    "and low rank": lambda m: m.codes * _column(m.scale) + m.left @ m.right,
    "part of a stack": lambda m: torch.cat([m.codes, m.codes]).chunk(2)[1] * _column(m.scale),
    "transposed": lambda m: m.codes.t() * m.scale,
}

DENSE: dict[str, Compose] = {
    "zero point of floats": lambda m: (m.weight - m.zeros) * _column(m.scale),
    "signs": lambda m: m.weight * m.weight.diagonal().int().sign().unsqueeze(-2),
    "scattered": lambda m: (m.left @ m.right).view(-1).scatter_add(0, m.places, m.values).view(WIDTH, WIDTH),
    "put": lambda m: (m.left @ m.right).view(-1).index_put((m.places,), m.values).view(WIDTH, WIDTH),
    "permuted": lambda m: m.weight[m.order],
    "gathered": lambda m: m.weight.gather(0, _column(m.order).expand(-1, WIDTH)),
    "masked": lambda m: m.weight * m.flags,
    "where": lambda m: torch.where(m.flags, m.weight, m.zeros.to(m.weight.dtype)),
}


@pytest.mark.parametrize("name", [*PACKED, *DENSE])
def test_what_counts_as_packed(name: str) -> None:
    compose = PACKED[name] if name in PACKED else DENSE[name]
    graph = torch.export.export(Coded(compose), (torch.arange(4),)).graph
    (weight,) = (node.args[1] for node in graph.nodes if op_name(node) == "aten::linear" and len(node.args) == 2)
    assert bool(packed_sources(weight)) == (name in PACKED)  # a node


def _kept(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[list[int], Report]:
    """Entries of each kept value, and the report, without gradients; outputs equal eager's."""
    torch._dynamo.reset()
    backend, ids, model = EagerBackend({"fold": "auto"}), torch.arange(8).reshape(2, 4), model.eval().to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(ids), model(ids))
    (module,) = backend.modules
    kept = [n for n in module.graph.find_nodes(op="placeholder") if n.name.startswith("normfx_fold")]
    return [n.meta["val"].numel() for n in kept], backend.report


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["cast", "codes of a table"])
def test_codes_are_neither_kept_unpacked_nor_centred_densely(name: str, scaled: bool, big: None) -> None:
    kept, report = _kept(Coded(PACKED[name], scaled))
    assert WIDTH * WIDTH not in kept
    assert [r.code for r in report.sites[1].refusals] == ["packed_weight"]


@pytest.mark.parametrize("name", ["scattered", "signs"])
def test_indices_and_signs_do_not_forbid_a_fold(name: str) -> None:
    report = assert_same_float64(Coded(DENSE[name]), (torch.arange(8).reshape(2, 4),))
    assert report.counts["to_rms_norm"] == 2 and report.counts["fold_affine"] == 2


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are worth keeping."""
    monkeypatch.setattr("normfx.rules.bake_weights.SMALL", 1)
