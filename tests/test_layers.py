"""The house has floors: a file imports only what lies above it, and torch's private parts stay in few rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "ir"),
    ("options",),
    ("kernels",),
    ("ir.ops", "ir.graph", "ir.regions", "ir.names"),
    ("ir.sites", "ir.cleanup", "ir.aliasing", "ir.expand"),
    ("ir.verify", "ir.printer"),
    ("capture",),
    ("recognize.axes", "recognize.algebra", "recognize.barriers"),
    ("recognize.flow", "recognize.rows"),
    ("recognize.formula",),
    ("recognize.spelled",),
    ("recognize.norms", "recognize.readers", "recognize.stream"),
    ("recognize",),
    ("rules.rule", "rules.algebra"),
    ("rules.centring",),
    ("rules.pre_rms_norm", "rules.linear_norm", "rules.fold_scale", "rules.fold_affine"),
    ("rules",),
    ("plan",),
    ("rewrite", "weights"),
    ("lower", "lower.inductor", "lower.verified"),
    ("report",),
    ("backend",),
    ("explain", "export"),
    ("demo",),
    ("cli",),
    ("",),
)
"""Top to bottom: a module may import from floors before its own."""

PRIVATE_ROOMS = frozenset(
    {
        "capture",
        "lower",
        "lower.inductor",
        "ir.aliasing",
        "ir.expand",
        "ir.regions",
        "ir.cleanup",
        "ir.names",
        "ir.verify",
    }
)
PUBLIC_ENOUGH = ("torch._ops.OpOverload", "torch._dynamo.reset")
"""Used everywhere in torch's own documentation for graph passes and backends."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in (("normfx", ""), ("kernels", "kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*([prefix] if prefix else []), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def _imports(tree: ast.AST) -> set[str]:
    """Dotted names of all imports, also those inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """What a module imports that its floor may not."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    if module not in floor:
        return [f"{module} stands on no floor: add it to FLOORS in tests/test_layers.py"]
    tree = ast.parse(source)
    wrong = []
    for name in _imports(tree):
        if name.split(".")[0] == "normfx":
            inner = name.removeprefix("normfx").removeprefix(".")
            target = inner if inner in known else inner.rpartition(".")[0]
            if floor.get(target, -1) >= floor[module] or module.startswith("kernels"):
                wrong.append(f"{module} imports {name}")
    if module not in PRIVATE_ROOMS:
        wrong += [f"{module} uses {name}" for name in sorted(_private(tree))]
    return wrong


def _private(tree: ast.AST) -> set[str]:
    """torch._x names that a module imports or spells out."""
    spelled = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | _imports(tree)
    private = {n for n in spelled if n.startswith("torch.") and any(p.startswith("_") for p in n.split(".")[1:])}
    return {n for n in private if not any(n.startswith(ok) or ok.startswith(n) for ok in PUBLIC_ENOUGH)} - {
        "torch.utils._pytree"
    }


@pytest.mark.parametrize("module", list(_modules()))
def test_floor(module: str) -> None:
    modules = _modules()
    assert violations(module, modules[module].read_text(), set(modules)) == []


def test_every_floor_is_lived_on() -> None:
    assert {name for names in FLOORS for name in names} == set(_modules())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from normfx.rewrite import rewrite"),
        ("ir.sites", "def f():\n    import normfx.backend"),
        ("kernels", "import normfx.errors"),
        ("nowhere", ""),
        ("plan", "import torch._inductor.config"),
        ("report", "x = torch._C._set_grad_enabled"),
    ],
)
def test_the_check_can_fail(module: str, source: str) -> None:
    assert violations(module, source, {*_modules(), "nowhere"})
