"""Other engines as variants: their results are right, or the reason why they are skipped is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_bench import bench, load, tiny
from torch import nn

from normfx.bench import engines, floor
from normfx.bench.engines import Engine, Skipped
from normfx.bench.measure import VARIANTS, Variant

NEEDS = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def is_installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) for package in NEEDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_the_same_function_or_a_reason(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tmp_path, "--models", "test_bench:tiny", "--variants", f"eager,{name}", "--base", "eager") == 0
    (measured,) = load(tmp_path)["cells"]
    assert measured["failures"] == {}
    if is_installed(name):
        assert measured["results"][name]["error"] < 1e-5 and measured["skipped"] == {}
    else:
        assert "not installed" in measured["skipped"][name] or "onnxscript" in measured["skipped"][name]
        assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_engine_is_skipped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> object:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(engines.importlib, "import_module", missing)
    model, inputs = tiny(2)
    with pytest.raises(Skipped, match=r"not installed .*normfx\[rivals\]"):
        Engine(name, model)(*inputs)


def test_bfloat16_is_not_for_onnxruntime() -> None:
    with pytest.raises(Skipped, match="float32"):
        engines._onnxruntime(None, nn.Linear(2, 2), (torch.ones(2),), torch.bfloat16)


def test_skipped_and_wrong_engines_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is skipped and the run is a success; one that computes something else is a failure, and has no time."""

    def convert(name: str, model: nn.Module, inputs: object) -> engines.Run:
        if name == "onnxruntime":
            raise Skipped("onnxruntime cannot convert the model: no such op")
        return lambda given: 1.01 * model(*given)

    monkeypatch.setattr(engines, "convert", convert)
    for variant in ("openvino", "onnxruntime"):
        monkeypatch.setitem(VARIANTS, variant, Variant(None, trains=False, asked=True, engine=variant))
    arguments = ("--models", "test_bench:tiny", "--base", "eager", "--floor")
    assert bench(tmp_path, *arguments, "--variants", "eager,onnxruntime") == 0
    (measured,) = load(tmp_path)["cells"]
    assert measured["skipped"] == {"onnxruntime": "onnxruntime cannot convert the model: no such op"}
    text = (tmp_path / "bench.md").read_text()
    assert "no such op" in text and "| floor ms |" in text
    assert bench(tmp_path, *arguments, "--variants", "eager,openvino") == 1
    (measured,) = load(tmp_path)["cells"]
    assert "wrong: off by 1.0e-02" in measured["failures"]["openvino"] and "openvino" not in measured["results"]


def test_the_floor_counts_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "rate", lambda dtype, device: 1e6)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(5, 8)
    assert floor.floor_ms(lambda: model(x), torch.float32, "cpu") == 1e3 * 2 * 5 * (8 * 16 + 16 * 4) / 1e6
