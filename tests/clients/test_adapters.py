"""The adapters of docs/clients.md: a model with each gives eager's results, and the page says what becomes of it."""

from __future__ import annotations

import importlib.metadata

import pytest
from adapters import ADAPTERS, Adapter, row
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library; a NormfxWarning is an error by EagerBackend

ROUGH = {
    "C3A": "it computes in float32 whatever the dtype of the model",
    "RandLoRA": "where an image changes by 1e-15 of itself, gradients of this model change by 8e-10 in eager too",
}
"""Adapters whose results agree to 1e-8 alone, and why."""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [pytest.param(adapter, id=adapter.name) for adapter in ADAPTERS])
def test_results_are_eager_s(adapter: Adapter) -> None:
    pytest.importorskip("peft")
    *counts, difference, why = (cell.strip() for cell in row(adapter).strip("|").split("|"))
    assert float(difference) < 1e-8
    assert adapter.name in ROUGH or float(difference) < 1e-9
    (listed,) = (cells for cells in _rows() if cells[0] == adapter.name)
    assert why == listed[-1]
    if f"peft {importlib.metadata.version('peft')}" in (ROOT / "docs" / "clients.md").read_text():
        assert counts == listed[:-2]


def test_the_page_lists_them() -> None:
    assert [cells[0] for cells in _rows()] == [adapter.name for adapter in ADAPTERS]


def _rows() -> list[list[str]]:
    text = (ROOT / "docs" / "clients.md").read_text().partition("| adapter | ")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
