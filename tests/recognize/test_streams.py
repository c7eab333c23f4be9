"""Published forms of streams, one model each: what becomes of every norm, and float64 equality of outputs and
gradients. The decisions are goldens that someone has read: EXPECTTEST_ACCEPT=1 pytest rewrites them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence import EagerBackend, assert_same_float64, transformed
from excerpts import accepted
from paths import TESTS
from stream_models import ROWS, built
from torch import Tensor
from torch.utils import _pytree as pytree

from normfx.report import SiteReport

PROMOTED = {"olmo2", "qwen3", "mixtral", "granite", "cohere"}
"""Models that ask for float32 by name."""
QUICK = {"mix", "peri", "hybrid", "magneto", "deepnorm", "scale norm", "experts", "adapters"}
SLOW = {
    "bert", "swin v2", "qwen3", "deit-iii", "beit", "cait", "clip", "mbart",
    "mixtral", "ia3", "prompts", "eva-02", "mixer", "pvt v2", "tsmixer", "cohere", "granite",
}  # fmt: skip
"""Those whose decisions are `slow` too."""
OF_ANY_LENGTH = [
    "exits",
    "pruned",
    *(pytest.param(row, marks=pytest.mark.slow) for row in ("depth", "experts", "adapters")),
]
GOLDENS = TESTS / "goldens" / "streams"


def golden(row: str) -> Path:
    return GOLDENS / f"{row.replace(' ', '_')}.txt"


def table(sites: Iterable[SiteReport]) -> str:
    """A line for each norm: what was applied, or else why not."""
    rows = [(s.name, s.kind, ", ".join(s.rules) or "-", _refused(s)) for s in sites]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )


def _refused(site: SiteReport) -> str:
    codes = [f"{r.rule}: {r.code}" for r in site.refusals]
    return f"({'; '.join(dict.fromkeys(codes))})" if codes else ""


ALL = [pytest.param(row, marks=[] if row in QUICK else pytest.mark.slow, id=row.replace(" ", "-")) for row in ROWS]


DECIDED = [
    pytest.param(row, id=row.replace(" ", "-"), marks=[pytest.mark.slow] if row in SLOW else [])
    for row in ROWS
    if row not in QUICK  # of these test_float64 compares the decisions too
]


@pytest.mark.parametrize("row", DECIDED)
def test_decisions(row: str) -> None:
    model, inputs = built(row)
    _, report = transformed(model, inputs)
    accepted(golden(row), table(report.sites))


@pytest.mark.parametrize("row", ALL)
def test_float64(row: str) -> None:
    """With live folds, their gradients, and kept folds."""
    model, inputs = built(row)
    report = assert_same_float64(model, inputs, promoted=row in PROMOTED)
    accepted(golden(row), table(report.sites))


@pytest.mark.parametrize("row", OF_ANY_LENGTH)
def test_lengths(row: str) -> None:
    """One graph, rewritten as that of a fixed length is, serves all lengths."""
    model, inputs = built(row)
    fixed = transformed(model, inputs)[1].counts
    model, backend = model.double(), EagerBackend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (9, 12, 17, 8):
        ids = torch.randint(1, 100, (2, tokens))
        with torch.no_grad():
            for want, got in zip(_tensors(model(ids)), _tensors(compiled(ids)), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert len(backend.graphs) == 1 and backend.report.counts == fixed


def _tensors(outputs: Any) -> list[Tensor]:
    return [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]


def test_every_golden_has_its_row() -> None:
    assert {path.stem.replace("_", " ") for path in GOLDENS.glob("*.txt")} == set(ROWS)
