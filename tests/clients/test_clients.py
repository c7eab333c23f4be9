"""The libraries of docs/clients.md: their results, compiled by normfx, are eager's."""

from __future__ import annotations

import importlib.metadata

import pytest
from clients import CLIENTS, Client
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries; a NormfxWarning is an error by NORMFX_STRICT


@pytest.mark.slow
@pytest.mark.parametrize("client", [pytest.param(c, id=f"{c.distribution}: {c.what}") for c in CLIENTS])
def test_results_are_eager_s(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(client.package)
    monkeypatch.setenv("NORMFX_STRICT", "1")
    outcome = client.run()
    assert outcome.report.graphs and not any(graph.failure for graph in outcome.report.graphs)
    counts = outcome.report.counts
    assert counts["layer_norm"] and outcome.difference < 1e-5
    (row,) = (row for row in _rows() if (row[0].rpartition(" ")[0], row[1]) == (client.distribution, client.what))
    if row[0].endswith(f" {importlib.metadata.version(client.distribution)}"):
        assert [str(counts[name]) for name in ("layer_norm", "to_rms_norm")] == row[3:5]


def test_the_page_lists_them() -> None:
    listed = [(row[0].rpartition(" ")[0], row[1], row[2]) for row in _rows()]
    assert listed == [(c.distribution, c.what, f"`{c.compiled}`") for c in CLIENTS]


def _rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "clients.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if " | `" in line]
