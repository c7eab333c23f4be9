"""The `normfx` command: what it loads, `explain`, `doctor`, what it says without transformers."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import Blocks, ids
from transformers import GPT2Config

import normfx
from normfx import doctor
from normfx.cli import COMMANDS, main
from normfx.weights.native import native_library

SCRIPT = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), (torch.randn(3, 8),)

def named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.read = nn.LayerNorm(8), nn.Linear(8, 8)
        def forward(self, *, x):
            return self.read(self.norm(x))
    return Named(), (), {"x": torch.randn(3, 8)}

def alone():
    class Alone(nn.Module):
        def forward(self):
            return torch.nn.functional.layer_norm(torch.ones(2, 4), (4,))
    return Alone()

def wrong():
    return plain()[0], torch.randn(3, 8)

def without_inputs():
    return plain()[0]
"""


def test_an_import_loads_errors_alone() -> None:
    """Dynamo, Inductor, sympy and networkx take seconds: they come with the first thing that needs them."""
    code = "import sys; before = set(sys.modules); import normfx; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    own = {name for name in loaded if name.startswith("normfx")}
    light = {"normfx", "normfx.checkout", "normfx.errors"}
    assert light <= own <= {*light, "normfx.kernels"}  # a checkout finds the folder of the kernels at once
    roots = {name.partition(".")[0] for name in loaded}
    assert roots.isdisjoint({"sympy", "networkx", "torch", "triton"})


def test_no_module_has_the_name_of_a_function() -> None:
    """It would take the function's place in the package once it is imported."""
    modules = {module.name for module in pkgutil.iter_modules(normfx.__path__)}
    assert modules and modules.isdisjoint(normfx.__all__) and set(normfx.__all__) <= set(dir(normfx))
    assert all(getattr(normfx, name).__name__ == name for name in normfx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        normfx.explian  # noqa: B018


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys; from normfx.cli import main; sys.argv = ['normfx', '{}']\ntry: main()\nexcept SystemExit: pass\n"
    )
    for option, word in (("--help", "doctor"), ("--version", "normfx 0.")):
        command = [sys.executable, "-c", code.format(option) + "print('torch' in sys.modules)"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert word in done.stdout and done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and f"usage: normfx {command}" in capsys.readouterr().out


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / f"factories_{abs(hash(tmp_path))}.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(("factory", "norms"), [("plain", 1), ("named", 1), ("alone", 1)])
def test_explain_a_script(factory: str, norms: int, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:{factory}"]) == 0
    out = capsys.readouterr().out
    assert "as in inference, without gradients" in out.splitlines()[0] and f"{norms} LayerNorm: " in out


def test_explain_a_module_as_json(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    found = {}
    for state in ("--train", "--no-grad"):
        assert main(["explain", f"{script.stem}:plain", "--json", state]) == 0
        found[state] = json.loads(capsys.readouterr().out)
    assert [each["counts"]["layer_norm"] for each in found.values()] == [1, 1]
    assert [each["graphs"][0]["gradients"] for each in found.values()] == [True, False]


def test_a_script_called_like_a_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that was named is read, whatever module has been imported under its name."""
    path = tmp_path / "json.py"
    path.write_text(SCRIPT)
    for _ in range(2):
        assert main(["explain", f"{path}:plain"]) == 0
        assert "1 LayerNorm: " in capsys.readouterr().out
    assert json.loads("1") == 1 and "json" in sys.modules and not hasattr(sys.modules["json"], "plain")


def test_explain_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(Blocks(), (ids(),)), tmp_path / "blocks.pt2")
    assert main(["explain", str(tmp_path / "blocks.pt2")]) == 0
    assert "in the mode that the program was exported in" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):  # a program has no other mode
        main(["explain", "--train", str(tmp_path / "blocks.pt2")])
    assert "leave it out" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "blocks.pt2")]) == 0
    assert "3 LayerNorms: all became RMSNorms" in capsys.readouterr().out


def test_explain_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(tmp_path)
    assert main(["explain", "--hf-config", str(tmp_path)]) == 0
    assert "5 LayerNorms: all became RMSNorms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one model"),
        (["a:b", "--hf-config", "gpt2"], "name one model"),
        (["no_colon"], "names no factory"),
        (["no_such_module_here:f"], "cannot import"),
        (["json:no_such_name"], "has no function"),
        (["missing.pt2"], "there is no file"),
        (["missing.py:f"], "there is no file missing.py"),
        ([".relative:f"], "it is a relative name"),
        (["{folder}/text.pt2"], "is no program of torch.export.save"),
        (["--hf-config", "{folder}"], "no configuration of transformers"),
        (["--hf-config", "clip"], "CLIPModel does not run with input_ids alone"),
        (["--hf-config", "gpt_neoxx"], "did you mean 'gpt_neox'?"),
        (["{script}:wrong"], "must return a module"),
        (["{script}:without_inputs"], "missing a required argument: 'input'; return (module, args)"),
    ],
)
def test_explain_says_what_is_wrong(
    arguments: list[str], words: str, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.with_name("text.pt2").write_text("no program")
    with pytest.raises(SystemExit) as left:
        main(["explain", *(argument.format(script=script, folder=script.parent) for argument in arguments)])
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == (native_library() is None)  # without a C++ compiler something is to be fixed
    out = capsys.readouterr().out
    for word in (
        "python",
        torch.__version__,
        "triton",
        "normfx",
        "C++ compiler",
        "folded weights",
        "allocator",
        "addmm",
    ):
        assert word in out or (word == "addmm" and "oneDNN" in out)
    monkeypatch.setattr(doctor, "native_library", lambda: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 1
    assert "must be fixed: install g++" in capsys.readouterr().out


def test_doctor_says_how_to_keep_folds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compiles = native_library() is not None
    for watches, words in ((False, "to improve: use Linux 6.7"), (True, "kept; the kernel tells")):
        monkeypatch.setattr(doctor, "watches_pages", lambda watches=watches: watches)
        assert main(["doctor"]) == (not compiles)
        assert (words if compiles else "nothing is watched") in capsys.readouterr().out


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--quick"])
    assert left.value.code == 2 and "pip install 'normfx[demo]'" in capsys.readouterr().err
