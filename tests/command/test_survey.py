"""`normfx survey`: the command on a few families, what it says of failures, and, slowly, the whole zoo."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from paths import ROOT
from torch import Tensor, nn

from normfx import survey
from normfx.cli import main
from normfx.errors import VerifyError
from normfx.survey.classes import MISSED, POST_NORM, UNNORMED
from normfx.survey.family import Family, floats, moved
from normfx.survey.run import EXACT
from normfx.survey.run import survey as surveyed
from normfx.survey.zoo import FAMILIES

DOCS = ROOT / "docs"


class Block(nn.Module):
    """One pre-norm branch over embedded rows, and a final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.last(x + self.down(torch.relu(self.up(self.norm(x))))))


class Broken(Block):
    """A block that cannot be run: the survey sees the model's own error."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"rows of {x.shape[-1]} features are not read")


class Nothing(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


class Wandering(Block):
    """Gives something else in each call, so that nothing can be compared."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


def small(build: Any, package: str = "torch") -> Family:
    return Family(build.__name__.lower(), package, build, floats(2, 5, 8))


def run(folder: Path, *families: Family, train: bool = False, defer: bool = False) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the command on families of this file."""
    known = {family.name: family for family in families}
    parsed = argparse.Namespace(models=",".join(known), list=False, train=train, defer=defer, output=folder)
    status = survey.main(parsed, known)
    return status, json.loads((folder / "survey.json").read_text())


@pytest.mark.slow
def test_families_of_the_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["survey", "--models", "decision-transformer,distilbert,olmo2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "3 families ran, 0 failed, 0 skipped" in printed and "by class" in printed
    found = {row["family"]: row for row in json.loads((tmp_path / "survey.json").read_text())["families"]}
    decisions, post, rms = (found[name] for name in ("decision-transformer", "distilbert", "olmo2"))
    assert decisions["layer_norms"] == decisions["converted"] == 8 and post["converted"] == 1
    assert (rms["layer_norms"], rms["rms_norms"], rms["kept"]) == (0, 17, [])
    assert sum(kept["because"] == POST_NORM for kept in post["kept"]) == 12
    for row in found.values():
        assert row["graphs"] == 1 and row["error"] < 1e-12 and not row["failure"]
        assert len(row["kept"]) == row["layer_norms"] - row["converted"]
        assert all(kept["site"] and kept["because"] and kept["codes"] and all(kept["details"]) for kept in row["kept"])
    text = (tmp_path / "survey.md").read_text()
    assert all(f"| {name} | transformers |" in text for name in found) and f"| {POST_NORM} |" in text


def test_a_failing_family_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It does not stop the rest, and the exit status says so."""
    status, found = run(tmp_path, small(Broken), small(Block), small(Nothing, "no_such_package"))
    broken, block, missing = found["families"]
    assert status == 1
    assert broken["failure"] == "ValueError: rows of 8 features are not read"
    assert (block["layer_norms"], block["converted"], block["failure"]) == (2, 2, "")
    assert missing["skipped"] == "no_such_package"
    assert found["totals"]["failed"] == found["totals"]["skipped"] == 1
    printed, text = capsys.readouterr().out, (tmp_path / "survey.md").read_text()
    for line in ("broken: failed: ValueError: rows of 8", "nothing: skipped: no_such_package is missing"):
        assert line in printed and line in text


def test_a_model_that_shows_nothing_fails() -> None:
    with pytest.raises(VerifyError, match="all 0"):
        surveyed(small(Nothing))
    with pytest.raises(VerifyError, match="is off by"):
        surveyed(small(Wandering))


class Alone(Block):
    """Dynamo leaves its last norm out of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.last.forward = torch.compiler.disable(self.last.forward)


def test_a_norm_outside_all_graphs_is_counted(tmp_path: Path) -> None:
    row = run(tmp_path, small(Alone))[1]["families"][0]
    assert (row["layer_norms"], row["converted"], row["graphs"], row["failure"]) == (2, 0, 2, "")
    assert sorted(kept["because"] for kept in row["kept"]) == sorted([MISSED, UNNORMED])


def test_training(tmp_path: Path) -> None:
    status, found = run(tmp_path, small(Block), train=True)
    assert status == 0 and found["families"][0]["converted"] == 2


class Observed(Block):
    """Something else reads its stream: only its last norm's product can take the norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.head(self.last(x))) + x.mean()


def test_deferred_norms_have_a_column(tmp_path: Path) -> None:
    (row,) = run(tmp_path, small(Observed), defer=True)[1]["families"]
    assert (row["layer_norms"], row["converted"], row["deferred"], row["kept"]) == (1, 0, 1, [])
    assert "1 (100.0 %) were deferred" in (tmp_path / "survey.md").read_text()
    (row,) = run(tmp_path, small(Observed))[1]["families"]
    assert row["deferred"] == 0 and len(row["kept"]) == 1


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["survey", "--models", "gpt2,gpt-17", "--output", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "unknown family 'gpt-17' in --models" in message and "gpt2" in message
    assert not (tmp_path / "out").exists()
    assert main(["survey", "--list", "--models", "gpt2,timm-vit"]) == 0
    listed = capsys.readouterr().out
    assert "gpt2" in listed and "timm-vit" in listed and "bert" not in listed


def test_nothing_stays_as_fresh_models_have_it() -> None:
    """Ones, zeros and other constants hide wrong folds."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    model.register_parameter("scale", scale)
    assert all(p.unique().numel() > 1 for p in moved(model).parameters())


def test_the_committed_table_is_of_this_zoo() -> None:
    lines = (DOCS / "survey.md").read_text().splitlines()
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert [name for name in FAMILIES if name not in named] == []
    assert len(FAMILIES) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_is_heard(name: str) -> None:
    """What a LayerNorm makes reaches the output: γ's gradient is far above the error at which a family fails."""
    family = FAMILIES[name]
    pytest.importorskip(family.package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries', of small configurations
        model = family.make()
        outputs = [x for x in pytree.tree_leaves(model(*family.inputs())) if isinstance(x, Tensor) and x.requires_grad]
    weights = [m.weight for m in model.modules() if isinstance(m, nn.LayerNorm) and m.weight is not None]
    if weights:
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        assert isinstance(loss, Tensor)
        size = sum(x.detach().square().sum() for x in outputs) ** 0.5
        heard = [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
        assert min(g.norm() / size for g in heard) > 1e-5
        assert len(heard) >= len(weights) - 1  # some keep a norm for a head that is not there


@pytest.mark.slow
def test_the_whole_zoo(tmp_path: Path) -> None:
    for package in ("transformers", "timm", "torchvision"):
        pytest.importorskip(package)
    status = main(["survey", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "survey.json").read_text())
    rows, totals = found["families"], found["totals"]
    assert [row["failure"] for row in rows if row["failure"]] == [] and status == 0
    assert totals["families"] - totals["skipped"] >= 60
    assert max(row["error"] for row in rows) <= EXACT
    for row in rows:
        assert len(row["kept"]) == row["layer_norms"] - row["converted"]
        assert all(kept["because"] and all(kept["details"]) for kept in row["kept"]), row["family"]
    assert totals["converted"] >= 0.7 * totals["layer_norms"], totals
