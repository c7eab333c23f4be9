"""`normfx bench` on a model of this file, through the command's own entry point. Nothing here looks at a time."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfx.bench.clock import Call, Captured
from normfx.bench.measure import VARIANTS, Cell, Measured, Result, Settings, Variant, measure, peak_memory
from normfx.bench.models import MODELS, make
from normfx.bench.present import Results, markdown
from normfx.bench.timing import Quartiles, interleaved, relative_error, speeds, wait_until_idle
from normfx.cli import main


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def tiny(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = nn.Sequential(nn.Linear(8, 8), Block(), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    for p in model.parameters():
        nn.init.normal_(p)
    return model, (torch.randn(batch, 5, 8),)


def broken(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    raise RuntimeError("no such weights")


def bench(folder: Path, *arguments: str) -> int:
    return main(["bench", "--rounds", "3", "--batches", "2", "--output", str(folder), *arguments])


def load(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return loaded


@pytest.mark.slow
def test_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--models", "test_bench:tiny", "--task", "forward,training", "--variants", "eager,inductor,normfx")
    assert bench(tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "normfx" in printed and "geometric mean" in printed
    results = load(tmp_path)
    described = {"cpu", "cores", "threads", "python", "torch", "triton", "device", "driver", "date"}
    assert described <= set(results["machine"])
    assert results["machine"]["torch"] == torch.__version__
    assert [m["cell"]["task"] for m in results["cells"]] == ["forward", "training"]
    for measured in results["cells"]:
        assert measured["failures"] == {}
        assert list(measured["results"]) == ["eager", "inductor", "normfx"]
        for result in measured["results"].values():
            assert all(math.isfinite(x) and x > 0 for x in (*result["ms"], *result["speed"], result["first_call_s"]))
            assert result["ms"] == sorted(result["ms"]) and result["speed"] == sorted(result["speed"])
            assert 0 < result["error"] < 1e-5
            assert result["rounds"] == 3 and result["calls"] >= 1
        assert measured["results"]["inductor"]["speed"] == [1, 1, 1]
        assert measured["results"]["inductor"]["extra_us"] == [0, 0, 0]
    text = (tmp_path / "bench.md").read_text()
    assert "| test_bench:tiny float32 batch 2 training | normfx |" in text and "| geometric mean |" in text
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")

    assert bench(tmp_path, *arguments, "--resume") == 0
    assert load(tmp_path) == results  # to the last digit: nothing was measured again
    with pytest.raises(SystemExit):
        bench(tmp_path, *arguments, "--resume", "--cold")
    assert "cold was False, is True" in capsys.readouterr().err


def test_a_failing_cell_is_noted_and_the_run_goes_on(tmp_path: Path) -> None:
    models = ("--models", "test_bench:broken,test_bench:tiny", "--dtypes", "bfloat16")
    assert bench(tmp_path, *models, "--variants", "inductor") == 1
    failed, measured = load(tmp_path)["cells"]
    assert failed["failures"] == {"cell": "RuntimeError: no such weights"} and failed["results"] == {}
    assert list(measured["results"]) == ["inductor"] and measured["results"]["inductor"]["error"] < 0.05
    assert "RuntimeError: no such weights" in (tmp_path / "bench.md").read_text()


def test_a_failing_variant_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "normfx", Variant("normfx", {"rules": "nothing"}))
    assert bench(tmp_path, "--models", "test_bench:tiny", "--variants", "normfx") == 1
    (measured,) = load(tmp_path)["cells"]
    assert list(measured["results"]) == ["inductor"]
    assert "unknown rule 'nothing'" in measured["failures"]["normfx"]


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert bench(tmp_path, "--models", "test_bench:tiny", "--variants", "eager") == 0
    assert "normfx[bench]" in capsys.readouterr().out
    assert load(tmp_path)["cells"] and not (tmp_path / "bench.png").exists()


CELL = Cell("test_bench:tiny", "float32", 2, "training", "cpu")


@pytest.mark.parametrize("task", ["forward", "training"])
def test_replays(task: str) -> None:
    """They are timed where what they write is right."""

    def copying(call: Call, device: str) -> Captured:
        written = call()
        return (lambda: [w.copy_(t) for w, t in zip(written, call(), strict=True)]), written

    def idle(call: Call, device: str) -> Captured:
        return (lambda: None), call()

    def wrong(call: Call, device: str) -> Captured:
        written = call()
        return (lambda: [w.copy_(1.01 * t) for w, t in zip(written, call(), strict=True)]), written

    cell, settings = replace(CELL, task=task), Settings(rounds=3, base="eager", graphs=True)
    found = measure(cell, ["eager"], settings, lambda stage: None, copying)
    assert found.failures == {} and found.results["eager"].graph_speed == (1, 1, 1)
    assert found.results["eager"].graph_ms is not None and found.results["eager"].graph_ms.low > 0
    for capture in (idle, wrong):
        found = measure(cell, ["eager"], settings, lambda stage: None, capture)
        assert found.failures["eager graph"].startswith("RuntimeError: wrong: a replay is off by ")
        assert found.results["eager"].graph_ms is None and found.results["eager"].ms.low > 0


def test_replays_are_columns(tmp_path: Path) -> None:
    once = Quartiles(1.0, 2.0, 3.0)
    result = Result(once, once, once, 1e-3, 1.0, 3, 1, graph_ms=once, graph_speed=once)
    results = Results({"cpu": "", "device": ""}, Settings(base="eager"), [Measured(CELL, {"eager": result})], left=2)
    assert Results.load(results.dump()) == results
    text = markdown(results)
    assert "| ms | speed | graph ms | graph speed | error | first call s |" in text
    assert "- left: 2 cells, for --resume" in text and "## Speed relative to eager" in text


def test_another_base_and_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--models", "test_bench:tiny", "--variants", "", "--base", "eager")
    assert bench(tmp_path, *arguments, "--minutes", "1e-9") == 0
    assert load(tmp_path)["left"] == 1 and load(tmp_path)["cells"] == []
    assert bench(tmp_path, *arguments, "--resume") == 0
    (measured,) = load(tmp_path)["cells"]
    assert load(tmp_path)["left"] == 0
    assert list(measured["results"]) == ["eager"] and measured["results"]["eager"]["speed"] == [1, 1, 1]


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no device, makes the models and measures nothing."""
    arguments = ("--device", "cuda", "--graphs", "--dry-run", "--task", "forward,training")
    assert bench(tmp_path, *arguments, "--models", "test_bench:tiny", "--variants", "inductor-freezing") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tiny float32 batch 2 forward, 0.0 million parameters: inductor, inductor-freezing" in printed
    assert "tiny float32 batch 2 training, 0.0 million parameters: inductor" in printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no such weights"):
        bench(tmp_path, *arguments, "--models", "test_bench:broken")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:normfx. lowering='triton' has no effect:normfx.NormfxWarning")
def test_modes(tmp_path: Path) -> None:
    """Every variant with a mode compiles; without a device there are no CUDA graphs in it."""
    names = [name for name, variant in VARIANTS.items() if variant.replays and "max" not in name]
    assert {"inductor-reduce-overhead", "normfx-reduce-overhead"} <= set(names)
    assert bench(tmp_path, "--models", "test_bench:tiny", "--variants", ",".join(names)) == 0
    (measured,) = load(tmp_path)["cells"]
    assert set(measured["results"]) == {"inductor", *names} and measured["failures"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--graphs",), "--graphs: CUDA graphs are of CUDA devices, not of cpu"),
        (("--base", "jit"), "unknown variant 'jit' in --base"),
        (("--base", "eager,inductor"), "--base takes one variant"),
        (("--models", "resnet"), "unknown model 'resnet' in --models; valid: gpt2_small"),
        (("--models", "test_bench:nothing"), "cannot import the model 'test_bench:nothing'"),
        (("--models", "no_module:f"), "No module named 'no_module'"),
        (("--variants", "jit"), "unknown variant 'jit' in --variants; valid: eager, inductor"),
        (("--dtypes", "int8"), "unknown dtype 'int8' in --dtypes; valid: bfloat16, float32"),
        (("--task", "serve"), "unknown task 'serve' in --task; valid: forward, training"),
        (("--batches", "0"), "--batches must be positive numbers"),
        (("--threads", "0"), "--threads must be a positive number"),
        (("--rounds", "1"), "--rounds must be 2 or more"),
        (("--minutes", "-1"), "--minutes must be a positive number, not -1"),
        (("--output", "/dev/null/results"), "--output /dev/null/results: Not a directory"),
    ],
)
def test_errors(arguments: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        bench(tmp_path, *arguments)
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_models_of_the_folder_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is a script elsewhere, from whose folder Python would import."""
    (tmp_path / "own_models.py").write_text(
        "import torch\ndef small(batch):\n    return torch.nn.Linear(2, 2), (torch.ones(batch, 2),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".", str(tmp_path))])
    assert bench(tmp_path, "--models", "own_models:small", "--dry-run") == 0
    assert "own_models:small" in capsys.readouterr().out


def test_turns() -> None:
    """Each call has one turn in a round, which begins with a call that is not timed; the order changes."""
    log: list[str] = []
    timed: list[tuple[str, int]] = []

    def note(call: Callable[[], object], repeats: int, device: str) -> float:
        call()
        timed.append((log[-1], repeats))
        return float(len(timed))

    repeats = {"a": 1, "b": 2, "c": 1}
    times = interleaved({n: partial(log.append, n) for n in "abc"}, 20, repeats, timed=note)
    assert log == [name for name, _ in timed for _ in range(2)]
    assert all(number == repeats[name] for name, number in timed)
    rounds = ["".join(name for name, _ in timed[i : i + 3]) for i in range(0, 60, 3)]
    assert {n: len(t) for n, t in times.items()} == dict.fromkeys("abc", 20)
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_a_turn_waits_for_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timed call has the machine to itself: threads that still run are waited for, but not for ever."""
    monkeypatch.setattr("normfx.bench.timing.LONGEST_WAIT", 600.0)
    busy = threading.Thread(target=lambda: sum(range(20_000_000)))
    busy.start()
    wait_until_idle()
    assert not busy.is_alive()
    monkeypatch.setattr("normfx.bench.timing.LONGEST_WAIT", 0.02)
    stop = threading.Event()
    endless = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    endless.start()
    wait_until_idle()
    stop.set()
    endless.join()


def test_numbers() -> None:
    assert speeds([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == Quartiles(2.5, 3.0, 3.5)
    exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
    assert relative_error([torch.tensor([3.0, 0.5]), torch.tensor([4.0])], exact) == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = torch.ones(256 * 2**20)  # 1 GiB here, which a child's ru_maxrss would begin with
    assert 10 < peak_memory(Cell("test_bench:tiny", "float32", 2, "forward", "cpu"), "eager", Settings()) < 1000
    assert ballast[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_built_in_models(name: str) -> None:
    if name != "layer_norm_chain":
        pytest.importorskip("transformers")
    model, inputs = make(name, "bfloat16", 1, "cpu")
    with torch.no_grad():
        output = model(*inputs)
    assert output.dtype == torch.bfloat16 and output.shape[0] == 1 and output.isfinite().all()
    again, _ = make(name, "bfloat16", 1, "cpu")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
