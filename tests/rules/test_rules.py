"""One harness over RULES: proof, plan and graph of every example and counterexample, float64 numerics, flags off."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from equivalence import EagerBackend, assert_same_float64, transformed
from excerpts import accepted
from packaging.version import Version
from paths import ROOT, TESTS

from normfx import rules
from normfx.export import rewrite
from normfx.ir import ops
from normfx.plan import refusal_codes
from normfx.rules import RULES, fold_affine, fold_batch_norm
from normfx.rules.rule import Example, Rule

CASES = [
    pytest.param(rule, example, id=f"{rule.name}-{example.name.replace(' ', '-')}")
    for rule in RULES
    for example in (rule.example, *rule.counterexamples)
]


GOLDENS = TESTS / "goldens" / "rules"


def _symbols(name: str, *shape: int) -> np.ndarray:
    array = np.empty(shape, dtype=object)
    for index in itertools.product(*map(range, shape)):
        array[index] = sympy.Symbol(name + "_" + "_".join(map(str, index)), real=True)
    return array


def test_every_rule_is_in_the_table() -> None:
    """Under the name of its file."""
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py") if "\nRULE = " in path.read_text("utf-8")}
    assert files == {rule.name for rule in RULES} and len(files) == len(RULES)


@pytest.mark.parametrize("d", [2, 3, 4])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_identity_is_proved(rule: Rule, d: int) -> None:
    pairs = list(rule.identity(_symbols, d))
    assert pairs
    for lhs, rhs in pairs:
        assert sympy.expand(lhs - rhs) == 0  # expands inside the root too, so equal norms become one term


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_the_proof_can_fail(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong formula makes the two sides of the identity differ. bake_weights has none of its own."""
    if rule.name == "bake_weights":
        assert rule.mistake is None  # products associate
        return
    assert rule.mistake is not None, f"give {rule.name} a `mistake`: a formula of its identity, and a wrong one"
    where, formula = rule.mistake
    monkeypatch.setattr(f"normfx.rules.{where}", formula)
    assert any(sympy.expand(lhs - rhs) != 0 for lhs, rhs in rule.identity(_symbols, 2))


def test_center_in_general_dimension() -> None:
    """The lemma of every centring rule, for symbolic d: with s = 1ᵀ1 = d, P = I − 11ᵀ/d has P² = P and P1 = 0.

    In the algebra spanned by I and J = 11ᵀ, where J·J = d·J and J·1 = d·1, a matrix is a pair (i, j) for i·I + j·J.
    """
    d = sympy.Symbol("d", positive=True, integer=True)

    def product(a: tuple[sympy.Expr, sympy.Expr], b: tuple[sympy.Expr, sympy.Expr]) -> tuple[sympy.Expr, sympy.Expr]:
        return a[0] * b[0], sympy.simplify(a[0] * b[1] + a[1] * b[0] + d * a[1] * b[1])

    projection = (sympy.Integer(1), -1 / d)
    assert product(projection, projection) == projection
    assert sympy.simplify(projection[0] + projection[1] * d) == 0
    plain = sympy.eye(5) - sympy.ones(5, 5) / 5
    assert plain * plain == plain
    assert plain * sympy.ones(5, 1) == sympy.zeros(5, 1)


def test_fold_formula_is_what_the_op_computes() -> None:
    torch.manual_seed(0)
    weight, bias, gamma, beta = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (4,), (6,), (6,)))
    new_weight, new_bias = fold_affine.fold(weight, bias, gamma, beta, 0.5)
    torch.testing.assert_close(
        ops.scale_features(weight, gamma, 1, 6, 1, torch.float64), new_weight, rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(
        ops.fold_shift(weight, beta, bias, 0.5, 1, 6, 1, torch.float64), new_bias, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4)])
def test_batch_norm_formula_is_what_the_ops_compute(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, bias, gamma, beta, mean = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), 4, 4, 4, 4))
    var = torch.rand(4, dtype=torch.float64)
    scale = ops.channel_scale(var, gamma.reshape(shape), 1e-5)
    torch.testing.assert_close(scale, gamma / (var + 1e-5).sqrt(), rtol=1e-14, atol=1e-14)
    new_weight, new_bias = fold_batch_norm.fold(weight, bias, scale, mean, beta)
    shift = ops.channel_shift(mean, scale, beta.reshape(shape), bias, torch.float64)
    torch.testing.assert_close(shift, new_bias, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        ops.scale_channels(weight, scale, 0, 0, torch.float64), new_weight, rtol=1e-14, atol=1e-14
    )


def test_folds_of_channels_are_rounded_once() -> None:
    """Folds of channels compute s, the product and the sum in float64: in float32 they have the error of one rounding."""
    torch.manual_seed(0)
    weight, bias, gamma, beta, mean = (torch.randn(s) for s in ((64, 32), 64, 64, 64, 64))
    var = torch.rand(64)
    scale, exact = (ops.channel_scale(v, g, 1e-5) for v, g in ((var, gamma), (var.double(), gamma.double())))
    folded = ops.scale_channels(weight, scale, 0, 0, torch.float32)
    assert torch.equal(folded, ops.scale_channels(weight.double(), exact, 0, 0, torch.float32))
    doubles = (t.double() for t in (mean, exact, beta, bias))
    shift = ops.channel_shift(mean, scale, beta, bias, torch.float32)
    assert torch.equal(shift, ops.channel_shift(*doubles, torch.float32))
    low = torch.rsqrt(var + 1e-5) * gamma
    assert not torch.equal(folded, weight * low[:, None])


def _options(rule: Rule, example: Example) -> dict[str, Any]:
    """The default rules, and this one."""
    return {"fold": example.fold, "rules": f"default,+{rule.name}", **example.options}


def check_decision(rule: Rule, example: Example) -> None:
    """One example alone, for a rule of another package and for a rule that was broken on purpose (mutants.py)."""
    _, report = transformed(example.build().eval(), example.inputs(), _options(rule, example))
    _as_it_says(rule, example, (*report.sites, *report.composed))


def _as_it_says(rule: Rule, example: Example, sites: Sequence[Any]) -> None:
    """The rule is applied to its example, and refuses a counterexample by its code; every refusal has nodes and a hint."""
    refused = [r for site in sites for r in site.refusals]
    codes = [r.code for r in refused if r.rule == rule.name]
    assert example.code in codes if example.code else not codes, example.name
    assert example.code or any(rule.name in site.rules for site in sites), example.name
    assert not example.code or all(r.nodes and r.hint for r in refused), example.name


SINCE = {"features spread over processes": "2.13"}
"""The first torch whose graphs show what a counterexample is refused for: before, the layout is in a closure."""


def _without(text: str, name: str) -> str:
    return "".join(part for part in re.split(r"(?=\n=== )", text) if not part.startswith(f"\n=== {name},"))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_golden(rule: Rule) -> None:
    """The rule's example before and after, and each counterexample with what the rule says of it: the folder
    tests/goldens/rules shows what normfx does. test_float64 proves the same cases."""
    shown, unseen = [f"{rule.name}: {rule.formula}\n"], []
    for example in (rule.example, *rule.counterexamples):
        if Version(torch.__version__) < Version(SINCE.get(example.name, "0")):
            unseen.append(example.name)
            continue
        torch._dynamo.reset()
        backend = EagerBackend(_options(rule, example))
        torch.compile(example.build().eval(), backend=backend, fullgraph=True)(*example.inputs())
        (graph,), report = backend.graphs, backend.report
        shown.append(f"\n=== {example.name}{f', refused: {example.code}' if example.code else ''}\n{graph.before}")
        sites = (*report.sites, *report.composed)
        _as_it_says(rule, example, sites)
        for site in sites:
            said = [f"refused: {r.code}: {r.meaning}" for r in site.refusals if r.rule == rule.name]
            said += ["applied"] if rule.name in site.rules else []
            shown += [f"--- {site.name or 'a norm without a module'}: {'; '.join(said)}\n"] if said else []
        if not example.code:
            kept = f"--- {backend.kept} computed once and kept\n" if backend.kept else ""
            shown.append(f"{kept}--->\n{graph.after}")
    golden, text = GOLDENS / f"{rule.name}.txt", "".join(shown)
    if unseen:
        assert text == functools.reduce(_without, unseen, golden.read_text(encoding="utf-8"))
    else:
        accepted(golden, text)


@pytest.mark.parametrize(("rule", "example"), CASES)
def test_float64(rule: Rule, example: Example) -> None:
    torch.manual_seed(0)
    model = example.build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    options = _options(rule, example)
    if example.fold == "live":
        del options["fold"]  # live, and kept folds too
    assert_same_float64(model, example.inputs(), options)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_flag_off(rule: Rule) -> None:
    """A rule that is switched off, alone, is applied nowhere, and its sites say why; the function stays the same."""
    options = {**_options(rule, rule.example), "rules": f"default,-{rule.name}"}
    report = assert_same_float64(rule.example.build().eval(), rule.example.inputs(), options)
    sites = (*report.sites, *report.composed)
    assert sites and all(rule.name not in site.rules for site in sites)
    assert not rule.default or "disabled" in {r.code for site in sites for r in site.refusals if r.rule == rule.name}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_all_off_leaves_the_graph(rule: Rule) -> None:
    _, report = transformed(rule.example.build().eval(), rule.example.inputs(), {"rules": "none"})
    (graph,) = report.graphs
    assert graph.before == graph.after
    assert {r.code for s in report.sites for r in s.refusals} == {"disabled"}
    assert all(f"+{r.rule}" in r.hint and "NORMFX_RULES" in r.hint for s in report.sites for r in s.refusals)
    assert all(s.refusals for s in report.sites)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_one_rule_alone(rule: Rule) -> None:
    model, inputs = rule.example.build().eval(), rule.example.inputs()
    options = {**_options(rule, rule.example), "rules": [rule.name]}
    _, report = transformed(model, inputs, options)
    assert {name for site in (*report.sites, *report.composed) for name in site.rules} == {rule.name}
    assert_same_float64(model, inputs, options)


@pytest.mark.parametrize("rule", [r for r in RULES if r.exported and r.default], ids=lambda r: r.name)
def test_idempotent(rule: Rule) -> None:
    """A rewritten program differs from the one it was made of, and holds nothing more to rewrite."""
    program = torch.export.export(rule.example.build().eval(), rule.example.inputs())
    before = str(program.graph)
    for fold in ("live", "frozen") if rule.example.fold == "live" else ("frozen",):
        options = {**_options(rule, rule.example), "fold": fold}
        once = rewrite(program, options)
        assert str(once.graph) != before == str(program.graph)
        assert str(rewrite(once, options).graph) == str(once.graph)


def test_every_refusal_code_has_a_counterexample() -> None:
    """Each rule that may give a code has its own, though rules share objections."""
    shown = {(rule.name, e.code) for rule in RULES for e in rule.counterexamples}
    missing = [(rule.name, code) for rule in RULES for code in rule.codes if (rule.name, code) not in shown]
    assert missing == []


def test_every_refusal_code_is_documented() -> None:
    """docs/refusals.md has a row for each code and meaning, with the rules that use it."""
    lines = (ROOT / "docs" / "refusals.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    rows = {(code.strip("`"), meaning): set(rules.split(", ")) for code, rules, meaning, _ in cells}
    wanted: dict[tuple[str, str], set[str]] = {}
    for rule, codes in refusal_codes().items():
        for code, meaning in codes.items():
            wanted.setdefault((code, meaning), set()).add(rule)
    for key, using in wanted.items():
        assert rows.get(key) == using, f"docs/refusals.md needs | `{key[0]}` | {', '.join(using)} | {key[1]} | … |"
    assert set(rows) == set(wanted)


def test_every_rule_is_documented() -> None:
    """docs/rules.md has a row for each rule, in the order in which they are decided."""
    lines = (ROOT / "docs" / "rules.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")][: len(RULES)] == [r.name for r in RULES]
