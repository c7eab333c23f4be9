"""The documents: their examples run, their codes resolve, the site builds without warnings."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import test_rules
import torch
from equivalence import EagerBackend, assert_same_float64
from paths import ROOT
from torch import nn

from normfx.errors import NormfxWarning
from normfx.rules import RULES, plugged


def snippets(page: str) -> list[str]:
    """The Python code on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def tutorial() -> str:
    """The rule of docs/write-a-rule.md."""
    (code,) = snippets("docs/write-a-rule.md")
    return code


def test_every_page_with_code_is_run() -> None:
    """The tests below run these pages; those of rules run the tutorial."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if snippets(str(page.relative_to(ROOT)))}
    assert found == {"README.md", "CONTRIBUTING.md", "docs/convert.md", "docs/kernels.md", "docs/write-a-rule.md"}


def test_the_code_of_the_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its compiled call is that of the model, its report is printed, and its program computes the same."""
    compiler, eager = torch.compile, EagerBackend()
    monkeypatch.setattr(
        torch, "compile", lambda model, backend: compiler(model, backend=eager if backend == "normfx" else backend)
    )
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double().eval(), torch.randn(3, 6).double()
    names: dict[str, Any] = {"model": model, "inputs": inputs, "args": (inputs,)}
    (code,) = snippets("README.md")
    exec(code, names)
    assert "1 LayerNorm" in capsys.readouterr().out
    for call in (names["compiled"], names["program"].module(), names["converted"]):
        torch.testing.assert_close(call(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_the_code_of_the_page_on_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the converted weights, and with `onnxscript` the rewritten program."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).eval()
    converts, exports = snippets("docs/convert.md")
    names = {"model": model, "args": (torch.randn(3, 6),)}
    exec(converts, names)
    assert torch.load("weights.pt")["0.weight"].mean(0).abs().max() < 1e-6
    before, _, writes = exports.partition("torch.onnx")
    exec(before, names)
    assert "0.weight_folded" in names["deployed"].state_dict and names["report"].counts["to_rms_norm"] == 1
    if importlib.util.find_spec("onnxscript") is not None:
        exec(f"torch.onnx{writes}", names)
        assert Path("model.onnx").exists()


def test_the_code_of_the_kernels_page(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a kernel."""
    (code,) = snippets("docs/kernels.md")
    exec(code, {})
    assert "@triton.jit" in capsys.readouterr().out


def test_the_code_for_contributors() -> None:
    """The small test of a rule that it shows is one of tests/rules, with what EXPECTTEST_ACCEPT=1 fills in."""
    (code,) = snippets("CONTRIBUTING.md")
    head, _, call = code.partition("        self.check(")
    text = (ROOT / "tests" / "rules" / "test_linear_norm.py").read_text(encoding="utf-8")
    assert head in text
    assert call.partition(', """')[0] in text


PROGRAM = """
import torch, normfx
from torch import nn

model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).double().eval()
call = lambda x: -model(x)
x = torch.randn(3, 6, dtype=torch.float64)
report = normfx.explain(call)(x)
assert any("fold_negation" in site.rules for site in report.sites), report
off = normfx.explain(call, options={"rules": "default,-fold_negation"})(x)
assert not any("fold_negation" in site.rules for site in off.sites)
with torch.no_grad():
    compiled = torch.compile(call, backend="normfx", fullgraph=True, options={"strict": True})
    assert torch.allclose(compiled(x), call(x), rtol=0, atol=1e-12)
print("done")
"""


@pytest.mark.slow
def test_the_tutorial_is_a_plugin(tmp_path: Path) -> None:
    """A package that names its rule as an entry point: it is used, it can be switched off, nothing changes."""
    (tmp_path / "own_rules").mkdir()
    (tmp_path / "own_rules" / "__init__.py").write_text("")
    (tmp_path / "own_rules" / "fold_negation.py").write_text(tutorial(), encoding="utf-8")
    info = tmp_path / "own_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[normfx.rules]\nfold_negation = own_rules.fold_negation:RULE\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("done"), done.stderr[-3000:]


def test_the_tutorial_passes_the_tests_of_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its identity, the decision on its example and each counterexample, and the float64 comparison."""
    path = tmp_path / "fold_negation.py"
    path.write_text(tutorial(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fold_negation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = module.RULE
    monkeypatch.setattr("normfx.rules.RULES", (*RULES, rule))
    monkeypatch.setattr("normfx.plan.RULES", (*RULES, rule))
    names = (*(r.name for r in RULES), rule.name)
    monkeypatch.setattr("normfx.options.RULE_NAMES", names)
    test_rules.test_identity_is_proved(rule, 3)
    for example in (rule.example, *rule.counterexamples):
        torch._dynamo.reset()
        test_rules.check_decision(rule, example)
        test_rules.test_float64(rule, example)
    assert_same_float64(rule.example.build(), rule.example.inputs(), {"rules": [rule.name]})


def test_rules_of_other_packages_that_cannot_be_used() -> None:
    """They are left out, each with a warning that says why."""
    own = [rule.name for rule in RULES]
    cases = {
        "no_such_module_of_rules:RULE": "ModuleNotFoundError",
        "normfx.rules.algebra:center": "it is a function, not a normfx.rules.rule.Rule",
        "normfx.rules.fold_scale:RULE": "there is a rule named 'fold_scale' already",
    }
    for value, why in cases.items():
        with pytest.warns(NormfxWarning, match=re.escape(why)):
            assert list(plugged([EntryPoint("own", value, "normfx.rules")], own)) == []


def test_identities_are_in_the_mathematics() -> None:
    """Whatever code, tests or documents call M3 stands in docs/maths.md; no other codes are used."""
    defined = set(re.findall(r"^\*\*(M\d+)\b", (ROOT / "docs" / "maths.md").read_text(encoding="utf-8"), re.MULTILINE))
    files = [p for folder in ("normfx", "kernels", "tests", "examples", "docs") for p in (ROOT / folder).rglob("*")]
    for path in [*files, ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        if path.suffix in (".py", ".md", ".txt") and path.name != "test_docs.py":
            text = path.read_text(encoding="utf-8")
            used = set(re.findall(r"(?<![\w.])M\d{1,2}\b(?!\.)", text))
            assert used <= defined, (path, used - defined)
            others = re.findall(r"\((?:maths )?[TBDAE]\d{1,2}\)", text)
            assert not others, (path, others)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Without warnings: every page is reached, every link leads somewhere."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "write-a-rule.html").exists()
