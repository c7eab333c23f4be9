"""The house has floors: a room imports only what lies above it, and torch's private parts stay in one room.

A room is a folder of the package, or a module that lies in none. Inside a folder modules may import each other in any
order that has no circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest
from paths import ROOT

FLOORS = (
    ("errors", "checkout", "kernels", "compat"),
    ("ir", "allocator"),
    ("graph",),
    ("checks", "printing", "recognize"),
    ("capture", "weights"),
    ("edit",),
    ("rules",),
    ("records", "options", "plan"),
    ("agreement", "apply", "dynamo", "environment", "lower", "picture", "report_text"),
    ("report_html",),
    ("report",),
    ("logs", "work"),
    ("backend",),
    ("converting", "explaining", "model_input", "doctor"),
    ("bench", "export"),
    ("explain_command", "demo", "survey"),
    ("cli",),
    ("",),
)
"""Top to bottom: a room may import from floors before its own. "" is normfx/__init__.py."""

PRIVATE_ROOM = "compat"

PUBLIC_ENOUGH = {
    # what torch's guide to backends names; torch is imported there only where it is needed
    "checkout": {"torch._dynamo.register_backend"},
}
"""What other modules may use of torch's private names."""

DOCUMENTED = frozenset({"_replace"})
"""Names with an underscore that Python documents."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in (("normfx", ""), ("kernels", "kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*([prefix] if prefix else []), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    return module.partition(".")[0]


FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


# ---------------------------------------------------------------- what a module imports


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[ast.stmt, str, str]]:
    """(statement, full dotted name, local name) of every import, at any depth; relative ones are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, alias.asname or ""
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, f"{base}.{alias.name}", alias.asname or alias.name


def imports_of(module: str, tree: ast.AST, known: Iterable[str]) -> list[tuple[ast.stmt, str, str]]:
    full = f"normfx.{module}".rstrip(".")
    is_package = module in ("", "kernels") or any(name.startswith(f"{module}.") for name in known)
    return list(_imports(tree, full if is_package else full.rpartition(".")[0]))


def _imported(
    imports: Iterable[tuple[ast.stmt, str, str]], known: Iterable[str]
) -> Iterator[tuple[ast.stmt, str, str]]:
    """(statement, name, module of this package that holds it)"""
    for statement, name, _ in imports:
        top, _, inner = name.partition(".")
        if top != "normfx":
            continue
        while inner and inner not in known:  # a name inside a module: the module is what is imported
            inner = inner.rpartition(".")[0]
        yield statement, name, inner


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """What a module imports or spells that its floor may not."""
    room = _room(module)
    if room not in FLOOR:
        return [f"{module} stands on no floor: add {room} to FLOORS in tests/project/test_layers.py"]
    tree = ast.parse(source)
    imports = imports_of(module, tree, known)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    wrong = [
        f"{module} imports {n}: installed, the folder is normfx.kernels" for _, n, _ in imports if _room(n) == "kernels"
    ]
    for statement, name, inner in _imported(imports, known):
        lies_above = _room(inner) == room or FLOOR.get(_room(inner), len(FLOORS)) < FLOOR[room]
        if not lies_above or (room == "kernels" and _room(inner) != room):
            wrong.append(f"{module} imports {name}, which does not lie above it")
        if id(statement) in inside:
            wrong.append(f"{module} imports {name} inside a function")
    if room != PRIVATE_ROOM:
        allowed = PUBLIC_ENOUGH.get(module, set())
        names = [
            *private_names(tree, imports),
            *private_attributes(tree, imports),
            *assignments_to_torch(tree, imports),
        ]
        wrong += [
            f"{module} uses {n}, which belongs into {PRIVATE_ROOM}" for n in dict.fromkeys(names) if n not in allowed
        ]
    return wrong


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Modules that import each other in a circle."""
    graph = nx.DiGraph()
    for module, source in sources.items():
        imports = imports_of(module, ast.parse(source), sources)
        graph.add_edges_from((module, inner) for _, _, inner in _imported(imports, sources) if inner != module)
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


# ---------------------------------------------------------------- private parts of torch


def private_names(tree: ast.AST, imports: Iterable[tuple[ast.stmt, str, str]]) -> list[str]:
    """torch._x names that a module imports or spells out, also through `import torch as t` and the like."""
    local = _local_names(imports)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {name for _, name, _ in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:  # a.b.c once, not a.b too
            first, _, rest = ast.unparse(node).partition(".")
            names.add(f"{local.get(first, first)}.{rest}")
    return sorted(name for name in names if name.startswith("torch.") and _is_private(name))


def _local_names(imports: Iterable[tuple[ast.stmt, str, str]]) -> dict[str, str]:
    return {own: name for _, name, own in imports if own} | {"torch": "torch"}


def private_attributes(tree: ast.AST, imports: Iterable[tuple[ast.stmt, str, str]]) -> list[str]:
    """x._y, also by getattr and the like, where the module itself defines no _y."""
    own, found = set(DOCUMENTED), []
    of_torch = {own for own, name in _local_names(imports).items() if _room(name) == "torch"}  # see private_names
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, holder = node.attr, ast.unparse(node.value)
        elif (asked := _asked_by_name(node)) is not None:
            holder, name = asked
        else:
            continue
        if _is_private(name) and name not in own and holder.partition(".")[0] not in of_torch:
            found.append(f"{holder}.{name}")
    return found


def _asked_by_name(node: ast.AST) -> tuple[str, str] | None:
    """("x", "_y") for getattr(x, "_y"), hasattr, setattr and delattr; None for any other node."""
    match node:
        case ast.Call(ast.Name("getattr" | "hasattr" | "setattr" | "delattr"), [holder, ast.Constant(str(name)), *_]):
            return ast.unparse(holder), name
    return None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def assignments_to_torch(tree: ast.AST, imports: Iterable[tuple[ast.stmt, str, str]]) -> list[str]:
    """torch.x = …, torch.x.y += …, del torch.x, setattr(torch.x, …)."""
    local = {own: name for own, name in _local_names(imports).items() if _room(name) == "torch"}
    changed = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
    ]
    changed += [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr")
    ]
    spelled = [ast.unparse(node) for node in changed]
    return [f"{text} =" for text in spelled if text.partition(".")[0] in local]


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("module", list(MODULES))
def test_floor(module: str) -> None:
    assert violations(module, MODULES[module].read_text(), set(MODULES)) == []


def test_no_circles() -> None:
    assert circles({module: path.read_text() for module, path in MODULES.items()}) == []


def test_every_floor_is_lived_on() -> None:
    assert {name for names in FLOORS for name in names} == {_room(module) for module in MODULES}


def test_every_allowance_is_used() -> None:
    for module, allowed in PUBLIC_ENOUGH.items():
        tree = ast.parse(MODULES[module].read_text())
        assert allowed <= set(private_names(tree, imports_of(module, tree, MODULES)))


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("plan", "from normfx.apply import apply_plan", "does not lie above"),
        ("plan", "from .apply import apply_plan", "does not lie above"),
        ("recognize.flow", "from ..plan import make_plan", "does not lie above"),
        ("graph.nodes", "from normfx.recognize import norms", "does not lie above"),
        ("weights.store", "from normfx.edit import Edit", "does not lie above"),
        ("plan", "import normfx", "does not lie above"),
        ("kernels", "import normfx.errors", "does not lie above"),
        ("kernels.spec", "from normfx.compat import pytree", "does not lie above"),
        ("plan", "import kernels", "normfx.kernels"),
        ("backend", "def f():\n    from normfx.plan import Plan", "inside a function"),
        ("nowhere", "", "to FLOORS"),
        ("nowhere.inside", "", "to FLOORS"),
        ("plan", "import torch._inductor.config", "torch._inductor.config"),
        ("plan", "import torch._dynamo", "torch._dynamo"),
        ("plan", "from torch._dynamo import config", "torch._dynamo.config"),
        ("explaining", "from torch._dynamo import reset_code", "torch._dynamo.reset_code"),
        ("report", "x = torch._C._set_grad_enabled", "torch._C"),
        ("report", "import torch as t\nx = t._C", "torch._C"),
        ("report", "from torch import _C as c\nx = c.Graph", "torch._C"),
        ("report", "x = torch._ops.OpOverload", "torch._ops.OpOverload"),
        ("report", "import torch.utils._pytree as pytree", "torch.utils._pytree"),
        ("graph.nodes", "def f(node):\n    return node.target._schema", "node.target._schema"),
        ("weights.watch", "def f(storage):\n    return storage._cdata", "storage._cdata"),
        ("weights.samples", "def f(t):\n    return getattr(t, '_version')", "t._version"),
        ("export", "def f(program):\n    return program._update()", "program._update"),
        ("backend", "def f(m):\n    m._boxed_call = True", "m._boxed_call"),
        ("backend", "torch.compile = print", "torch.compile ="),
        ("backend", "import torch.nn.functional as F\nF.layer_norm = print", "F.layer_norm ="),
        ("backend", "setattr(torch.nn, 'Linear', None)", "torch.nn ="),
    ],
)
def test_the_check_can_fail(module: str, source: str, message: str) -> None:
    found = violations(module, source, {*MODULES, "nowhere"})
    assert found and all(message in line for line in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from .errors import NormfxError"),
        ("recognize.flow", "from .axes import Axes\nfrom ..ir import ops"),
        ("demo", "def f():\n    import transformers"),
        ("compat.operators", "x = torch._ops.OpOverload"),
        ("report", "x = torch.__version__"),
        (
            "report",
            "class A:\n    def f(self, other):\n        self._x = 0\n        return other._x",
        ),
        ("plan", "def f(site):\n    return site._replace(x=0)"),
    ],
)
def test_the_check_can_pass(module: str, source: str) -> None:
    assert violations(module, source, set(MODULES)) == []


def test_a_circle_is_found() -> None:
    sources = {
        "ir.a": "from normfx.ir import b",
        "ir.b": "from normfx.ir.c import x",
        "ir.c": "import normfx.ir.a",
        "ir": "",
    }
    assert circles(sources) == [["ir.a", "ir.b", "ir.c"]]
