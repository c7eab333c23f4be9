"""The libraries of docs/clients.md: their results, compiled by normfx, are eager's."""

from __future__ import annotations

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
    assert outcome.report.counts["layer_norm"] and outcome.difference < 1e-5


def test_the_page_lists_them() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "clients.md").read_text().splitlines() if " | `" in line]
    listed = [(row[0].removeprefix("| ").rpartition(" ")[0], row[1], row[2]) for row in rows]
    assert listed == [(c.distribution, c.what, f"`{c.compiled}`") for c in CLIENTS]
