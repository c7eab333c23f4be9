"""Runs each example and checks the numbers it prints: in its own process, or here where nothing is compiled."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import unittest
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed
from paths import ROOT

EXAMPLES = ROOT / "examples"
NUMBER = r"(\d[\d.]*(?:e[+-]?\d+)?)"
LIMIT = 900  # seconds: processes that wait for each other without end fail
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def ran(*arguments: str, cwd: Path, environment: Mapping[str, str] = {}) -> str:
    """Runs Python with these arguments and returns what it printed; an error or a warning of normfx fails the test.

    The process has one thread: on a busy machine two would wait for each other.
    """
    own = {"OMP_NUM_THREADS": "1", "NORMFX_STRICT": "1", "NORMFX_VERIFY": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | own | environment, capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "NormfxWarning" not in done.stderr, done.stderr[-4000:]
    return done.stdout


def example(name: str, folder: Path, *before: str) -> str:
    """Runs an example and returns what it printed."""
    return ran(*before, str(EXAMPLES / name), cwd=folder)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports an example into this process, under its name: Dynamo imports the modules of functions that it inlines."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


def numbers(pattern: str, printed: str) -> list[float]:
    """Finds a pattern, which must occur once in the text, and returns its numbers; each # stands for one."""
    found = re.findall(pattern.replace("#", NUMBER), printed)
    assert len(found) == 1, (pattern, printed)
    return [float(n) for n in (found[0] if isinstance(found[0], tuple) else found)]


def assert_all_rms_norms(printed: str, norms: int) -> None:
    assert numbers("# of # LayerNorms became RMSNorms", printed) == [norms, norms], printed


def assert_small(pattern: str, printed: str, limit: float = 1e-5) -> None:
    """Asserts that a difference is what rounding of float32 explains, for values near 1."""
    assert numbers(pattern, printed)[0] < limit, printed


def test_the_table_names_every_example() -> None:
    index = (EXAMPLES.parent / "docs" / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w./]+)` \|", index, re.MULTILINE)
    files = [path.name for path in EXAMPLES.glob("*.py")]
    packages = [f"{path.parent.name}/" for path in EXAMPLES.glob("*/pyproject.toml")]
    assert sorted(named) == sorted(files + packages)


def test_explaining(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    imported("explain_refusals", monkeypatch).main()
    printed = capsys.readouterr().out
    assert "final: applied fold_affine, fuse_residual_norm" in printed
    assert "pre_rms_norm refused, observed: " in printed


def test_explaining_a_vit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    imported("explain_vit", monkeypatch).main()
    assert numbers("# of # LayerNorms become RMSNorms", capsys.readouterr().out) == [5, 5]


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = example("quickstart.py", tmp_path)
    assert "5 LayerNorms: all became RMSNorms" in printed
    assert_small("largest difference from eager: #", printed)


@pytest.mark.slow
def test_train_gpt2(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = example("train_gpt2.py", tmp_path)
    assert_all_rms_norms(printed, 5)
    first, last = numbers("normfx: loss # at the first step, # after 30 steps", printed)
    assert last < 0.8 * first, printed
    assert abs(numbers("eager: loss # at the first step, # after 30 steps", printed)[1] - last) < 1e-3
    assert_small("largest difference of the losses: #", printed, 1e-3)  # 30 steps of Adam


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    printed = example("lora_finetune_and_merge.py", tmp_path)
    assert_all_rms_norms(printed, 3)
    first, last = numbers("loss # at the first step, # after 10 steps", printed)
    assert last < first, printed
    assert_small("largest difference of the losses from eager: #", printed, 1e-4)
    assert_small("merged in place, largest difference from eager: #", printed)
    assert_small("and from the output before: #", printed)
    assert_small("merged and unloaded, largest difference from eager: #", printed)
    assert numbers("the adapters had changed the logits by #", printed)[0] > 0.01, printed


@pytest.mark.slow
@gloo
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes(name: str, tmp_path: Path) -> None:
    printed = example(f"{name}.py", tmp_path, *TORCHRUN)
    processes, compiled, eager = numbers("# processes, # of # gradients", printed)
    assert (processes, compiled) == (2, eager) and eager == 17, printed
    assert_all_rms_norms(printed, 3)
    assert_small("largest difference of the gradients from eager (?:DDP|FSDP): #", printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packages", "norms", "limit"),
    [("trainer.py", ("transformers", "accelerate"), 3, 1e-4), ("lightning_fit.py", ("lightning",), 5, 1e-5)],
)
def test_trainers(name: str, packages: tuple[str, ...], norms: int, limit: float, tmp_path: Path) -> None:
    for package in packages:
        pytest.importorskip(package)
    printed = example(name, tmp_path)
    assert_all_rms_norms(printed, norms)
    first, last = numbers("loss # at the first step, # after 8", printed)
    assert last < first, printed
    assert_small("largest difference of the losses from eager: #", printed, limit)


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    printed = example("export_aoti.py", tmp_path)
    assert numbers("# LayerNorms exported, # left after the rewrite", printed) == [3, 0]
    assert_small("AOTInductor, largest difference from eager: #", printed)
    if "ONNX: skipped" not in printed:
        assert "RMSNormalization" in printed and "LayerNormalization" not in printed, printed
    if "ONNX Runtime" in printed:
        assert_small("ONNX Runtime, largest difference from eager: #", printed)


def failures(module: ModuleType) -> int:
    """Runs the tests of a module and returns how many fail."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    assert result.testsRun == 2 and not result.errors, result.errors
    return len(result.failures)


def test_golden_graph_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tests pass, and fail where a rule is switched off."""
    pytest.importorskip("expecttest")
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    module = imported("golden_graph_test", monkeypatch)
    assert failures(module) == 0
    monkeypatch.setenv("NORMFX_RULES", "default,-pre_rms_norm")
    assert failures(module) == 2


@pytest.mark.slow
def test_golden_graph(tmp_path: Path) -> None:
    """It is a program, too."""
    pytest.importorskip("expecttest")
    example("golden_graph_test.py", tmp_path)


@pytest.mark.slow
def test_plugin_rule(tmp_path: Path) -> None:
    """The package is installed by pip: its rule is used, and can be switched off."""
    pytest.importorskip("setuptools", minversion="77")  # older ones need another package to build a wheel
    shutil.copytree(EXAMPLES / "plugin_rule", tmp_path / "source")
    installed = tmp_path / "installed"
    offline = ("--no-index", "--no-build-isolation", "--no-deps", "--target", str(installed))
    ran("-m", "pip", "install", *offline, str(tmp_path / "source"), cwd=tmp_path)
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = ran(str(EXAMPLES / "plugin_rule" / "use_rule.py"), cwd=tmp_path, environment={"PYTHONPATH": path})
    assert re.search(r"^default: applied .*fold_negation", printed, re.MULTILINE), printed
    assert re.search(r"^default,-fold_negation: applied (?!.*fold_negation)", printed, re.MULTILINE), printed
    assert_small("largest difference from eager: #", printed)


@pytest.mark.slow
def test_vit(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    printed = example("vit_inference.py", tmp_path)
    assert_all_rms_norms(printed, 5)
    assert_small("largest difference from eager: #", printed)


@pytest.mark.slow
def test_whisper_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = example("whisper_encoder.py", tmp_path)
    assert_all_rms_norms(printed, 5)
    assert_small("largest difference from eager: #", printed)
