"""Rules broken on purpose, one statement at a time: whether the tests of rules notice.

    python tests/rules/mutants.py                     every statement of guard, rewrite and fold of every rule: minutes
    python tests/rules/mutants.py pre_rms_norm …      of these rules

A mutant is a rule's module in which one statement is left out, or one condition turned round. It is killed by the first
of the rule's own tests in test_rules.py that fails; a mutant that none kills is printed as alive. The functions are
those that a rule gives (guard, rewrite, fold) and what they call in the same module.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import io
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # where it is run as a program

import test_rules
import torch
from rich.console import Console
from rich.table import Table

from normfx.rules import RULES
from normfx.rules.rule import Rule

BROKEN = ("guard", "rewrite", "fold")


@dataclass(frozen=True)
class Mutant:
    """A function of a module that serves a rule, with one change. `code` is the module's syntax tree with it."""

    rule: Rule[Any]
    module: types.ModuleType
    function: str
    change: str
    code: ast.Module

    def install(self) -> Iterator[None]:
        """Put the module's functions, compiled from the changed tree, in place; and back afterwards."""
        module = self.module
        changed = types.ModuleType(module.__name__)
        changed.__dict__.update(module.__dict__)
        body = [node for node in self.code.body if isinstance(node, ast.FunctionDef)]
        exec(compile(ast.Module(body, []), str(module.__file__), "exec"), changed.__dict__)
        names = {node.name for node in body}
        saved = {name: getattr(module, name) for name in names}
        fields = {name: getattr(self.rule, name) for name in ("guard", "rewrite")}
        for name in names:
            setattr(module, name, changed.__dict__[name])
        for name, old in fields.items():
            if old.__module__ == module.__name__:
                object.__setattr__(self.rule, name, changed.__dict__[old.__name__])
        try:
            yield
        finally:
            for name, old in saved.items():
                setattr(module, name, old)
            for name, old in fields.items():
                object.__setattr__(self.rule, name, old)


def mutants(rule: Rule[Any], coarse: bool = False) -> Iterator[Mutant]:
    """Mutants of a rule. coarse: whole bodies only, one for each function."""
    given = {"guard": rule.guard.__module__, "rewrite": rule.rewrite.__module__, "fold": f"normfx.rules.{rule.name}"}
    for name in dict.fromkeys(given.values()):
        module = sys.modules[name]
        tree = ast.parse(inspect.getsource(module))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        roots = [function for function in BROKEN if given[function] == name and function in functions]
        if not rule.codes and "guard" in roots:
            roots.remove("guard")  # it never objects
        for reached in _reached(functions, roots):
            for change, edited in _whole(functions[reached]) if coarse else _edits(functions[reached]):
                code = copy.deepcopy(tree)
                code.body = [edited if isinstance(n, ast.FunctionDef) and n.name == reached else n for n in code.body]
                yield Mutant(rule, module, reached, change, ast.fix_missing_locations(code))


def _reached(functions: dict[str, ast.FunctionDef], roots: list[str]) -> list[str]:
    """The functions that a rule gives, and what they call in their module."""
    found = list(roots)
    for name in found:
        called = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        found += [other for other in functions if other in called and other not in found]
    return found


def _whole(function: ast.FunctionDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    if function.name in BROKEN:
        edited = copy.deepcopy(function)
        generator = any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in ast.walk(function))
        replaced = "return iter(())" if generator or function.name == "guard" else "return None"
        written = ast.parse(f"def f():\n    {replaced}\n").body[0]
        assert isinstance(written, ast.FunctionDef)
        edited.body = written.body
        yield "does nothing", edited


def _edits(function: ast.FunctionDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The function without one of its statements, and with each of its conditions turned round."""
    count = sum(1 for _ in _statements(function))
    for i in range(count):
        edited = copy.deepcopy(function)
        body, place = list(_statements(edited))[i]
        statement = body[place]
        text = ast.unparse(statement).splitlines()[0]
        if isinstance(statement, ast.If):
            statement.test = ast.UnaryOp(ast.Not(), statement.test)
            yield f"turned round: {text}", edited
            edited = copy.deepcopy(edited)
            body, place = list(_statements(edited))[i]
        body[place] = ast.Pass()
        yield f"left out: {text}", edited


def _statements(node: ast.AST) -> Iterator[tuple[list[ast.stmt], int]]:
    for field in ("body", "orelse"):
        body = getattr(node, field, None)
        if not isinstance(body, list):
            continue
        for place, statement in enumerate(body):
            is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_docstring and not isinstance(statement, ast.Pass):
                yield body, place
                yield from _statements(statement)


def killer(mutant: Mutant) -> str:
    """The name of the first test of the mutant's rule that fails; "" where all pass."""
    rule = mutant.rule
    cases = [(rule, example) for example in (rule.example, *rule.counterexamples)]
    tests: list[tuple[Any, tuple[Any, ...]]] = [(test_rules.check_decision, case) for case in cases]
    tests += [(test_rules.test_float64, case) for case in cases]
    tests += [(test_rules.test_golden, (rule,)), (test_rules.test_one_rule_alone, (rule,))]
    tests += [(test_rules.test_identity_is_proved, (rule, 2))]
    with contextlib.contextmanager(mutant.install)():
        for test, arguments in tests:
            torch._dynamo.reset()
            torch.manual_seed(0)
            try:
                with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    test(*arguments)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                return f"{test.__name__}: {type(error).__name__}"
    return ""


def main() -> None:
    names = sys.argv[1:]
    table = Table("rule", "function", "change", "killed by")
    alive = 0
    for rule in RULES:
        for mutant in mutants(rule) if not names or rule.name in names else ():
            by = killer(mutant)
            alive += not by
            table.add_row(rule.name, mutant.function, mutant.change, by or "[bold red]alive")
            print(f"{rule.name} {mutant.function}: {mutant.change}: {by or 'ALIVE'}", flush=True)
    Console().print(table)
    raise SystemExit(bool(alive))


if __name__ == "__main__":
    main()
