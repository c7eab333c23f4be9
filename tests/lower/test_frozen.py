"""Frozen folds thaw when a parameter changes, and freeze again when it has been stable."""

from __future__ import annotations

import pytest
import torch
from folding import check, compiled, folding, net
from writes import WRITES


def test_frozen_again_once_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monkeypatch.setattr("normfx.lower.folded.REFREEZE_AFTER", 4)
    call = compiled(model, "frozen")
    before = check(call, model)
    assert folding().freezes == 1
    for write in ("p.data.add_", "p.data = t"):
        WRITES[write](model)
        freezes = folding().freezes
        before = check(call, model, before)
        assert folding().variants == ("cached",)
        for _ in range(40):
            check(call, model)
        assert folding().variants == ("cached", "frozen") and folding().freezes == freezes + 1


def test_not_frozen_again_while_parameters_keep_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monkeypatch.setattr("normfx.lower.folded.REFREEZE_AFTER", 4)
    call = compiled(model, "frozen")
    before = check(call, model)
    for _ in range(20):
        model.up.weight.data.add_(0.1)
        before = check(call, model, before)
    assert folding().freezes == 1


def test_inductor_freezing_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fold="auto" and Inductor's own switch, which alone goes stale."""
    model = net()
    call = compiled(model, "auto", inductor={"freezing": True})
    before = check(call, model)
    assert "frozen" in folding().variants
    model.up.weight.data.mul_(2.0)
    check(call, model, before)


def test_inductor_freezing_switched_on_for_the_process() -> None:
    """Dynamo then makes the parameters attributes of the graph."""
    model = net()
    call = compiled(model, "auto")
    with torch._inductor.config.patch(freezing=True):
        before = check(call, model)
        assert "frozen" in folding().variants
        for name in ("p.data.add_", "p.data = t", "SGD fused", "parameter replaced"):
            WRITES[name](model)
            before = check(call, model, before)
