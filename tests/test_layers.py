"""The house has floors: a file imports only what lies above it, and torch's private parts stay in few rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "ir", "checkout"),
    ("allocator",),
    ("kernels.spec",),
    ("kernels.launch", "kernels.cost"),
    ("kernels.rows",),
    ("kernels.forward", "kernels.backward"),
    ("kernels.source",),
    ("kernels.build",),
    ("kernels.run", "kernels.refold"),
    ("kernels",),
    ("ir.opaque", "ir.form", "ir.effects"),
    ("ir.ops", "ir.regions", "ir.names", "ir.cleanup", "ir.fakes"),
    ("ir.aliasing", "ir.barriers"),
    ("ir.graph",),
    ("ir.sites", "ir.order", "ir.packing", "ir.expand", "ir.sources", "ir.recompute"),
    ("ir.facts",),
    ("ir.functionalize", "ir.simplify", "ir.verify", "ir.printer", "ir.inline", "ir.calls"),
    ("ir.producers", "ir.fused_ops"),
    ("ir.fusion", "ir.resize"),
    ("capture", "specialize"),
    ("recognize.axes", "recognize.algebra"),
    ("recognize.table",),
    ("recognize.moves", "recognize.arithmetic", "recognize.indexing", "recognize.mixing", "recognize.linears"),
    ("recognize.flow", "recognize.rows"),
    ("recognize.row_ops",),
    ("recognize.formula",),
    ("recognize.spelled",),
    ("recognize.composed", "recognize.norms", "recognize.readers", "recognize.stream"),
    ("recognize.residual",),
    ("recognize",),
    ("edit.surgery",),
    ("edit",),
    ("edit.writer",),
    ("rules.algebra", "rules.device"),
    ("rules.cut",),
    ("rules.rule", "rules.storage"),
    ("rules.centring",),
    ("rules.pre_rms_norm", "rules.linear_norm", "rules.fold_affine", "rules.bake_weights"),
    ("rules.crms_norm", "rules.fold_scale", "rules.fuse_residual_norm"),
    ("rules",),
    ("records", "options", "plan"),
    ("dynamo", "report_text", "environment", "line_diff"),
    ("report_html",),
    ("apply", "weights"),
    ("weights.expression", "weights.handles", "weights.native", "weights.samples", "weights.live"),
    ("weights.watch",),
    ("weights.kept", "weights.store"),
    ("weights.budget",),
    ("lower", "lower.norm_ops"),
    ("lower.two_norms", "lower.writer_bias"),
    ("lower.measurements", "lower.verified", "lower.choice"),
    ("lower.gemm", "lower.rates"),
    ("lower.stored", "lower.products", "lower.native"),
    ("lower.inductor",),
    ("lower.packed",),
    ("lower.affordable",),
    ("lower.hoist",),
    ("lower.constants", "lower.outside"),
    ("lower.folded",),
    ("lower.triton",),
    ("picture",),
    ("report",),
    ("logs",),
    ("backend",),
    ("explaining", "export"),
    ("bench.models", "bench.timing", "bench.machine", "bench.command", "bench.norms", "bench.clock"),
    ("model_input", "doctor"),
    ("explain_command",),
    ("bench.engines", "bench.floor"),
    ("bench.measure", "bench.output"),
    ("bench.present", "bench.rivals"),
    ("bench.contest",),
    ("bench.kernel_report",),
    ("bench.kernels", "bench.depth"),
    ("bench", "demo"),
    ("survey.family", "survey.classes"),
    ("survey.transformers_models", "survey.timm_zoo", "survey.torchvision_zoo", "survey.run"),
    ("survey.text_zoo", "survey.sense_zoo", "survey.row"),
    ("survey.zoo", "survey.present"),
    ("survey",),
    ("cli",),
    ("",),
)
"""Top to bottom: a module may import from floors before its own. "" is normfx/__init__.py."""

PRIVATE_ROOMS = frozenset(
    {
        "capture",
        "dynamo",
        "ir.fakes",
        "specialize",
        "lower",
        "lower.inductor",
        "lower.constants",
        "lower.folded",
        "lower.gemm",
        "lower.measurements",
        "lower.choice",
        "lower.packed",
        "lower.products",
        "lower.stored",
        "lower.rates",
        "lower.verified",
        "ir.aliasing",
        "ir.functionalize",
        "ir.expand",
        "ir.sources",
    }
)
"""Modules that may use any private part of torch."""

PRIVATE_NAMES = {
    "*": {
        # the classes of an op in a graph, which torch's own guides to backends and passes use
        "torch._ops.HigherOrderOperator",
        "torch._ops.OpOverload",
        "torch.utils._pytree",  # it has no public spelling (torch 2.13, 2.15)
    },
    "bench.measure": {
        "torch._dynamo.reset",
        "torch._inductor.config.patch",  # Dynamo reads `freezing` there, whatever torch.compile's options say
    },
    # the one setting that lets a backward pass of Inductor run twice
    "bench.rivals": {"torch._functorch.config"},
    "checkout": {"torch._dynamo.register_backend"},
    "explaining": {"torch._dynamo.reset"},
    # TORCH_TRACE has no public spelling (torch 2.11 to 2.14)
    "logs": {"torch._logging.trace_structured"},
    "survey.run": {
        "torch._dynamo.reset",
        "torch._dynamo.config.patch",  # a model with more graphs than Dynamo allows by default
    },
    "ir.cleanup": {"torch._subclasses.FakeTensor"},
    "ir.opaque": {"torch._ops.OpOverloadPacket", "torch._subclasses.FakeTensor"},
    "ir.producers": {"torch._subclasses.FakeTensor", "torch.utils._python_dispatch.is_traceable_wrapper_subclass"},
    "ir.ops": {"torch._C._are_functorch_transforms_active"},
    "ir.regions": {
        # the nodes that a canonical graph keeps for grad mode and autocast
        "torch._C._set_grad_enabled",
        "torch.amp.autocast_mode._enter_autocast",
        "torch.amp.autocast_mode._exit_autocast",
        # `_get_data_attr` is what Dynamo writes for `x.data`
        "torch._C._autograd",
    },
    "weights.kept": {"torch._subclasses.FakeTensor"},
    "weights.native": {"torch._inductor.codecache.CppCodeCache"},
    # whether a tensor is memory of its own
    "weights.watch": {"torch._C._functorch.is_functorch_wrapped_tensor"},
    # folds are computed out of sight of the modes that a caller is in
    "weights.store": {"torch.utils._python_dispatch._disable_current_modes"},
    "ir.verify": {
        "torch._dispatch.python.enable_python_dispatcher",
        "torch._subclasses.FakeTensor",
        "torch._subclasses.FakeTensorMode",
    },
}
"""What the others may use, by module; "*" is everyone. A name allows what is public in it, nothing beside it."""


def _modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in (("normfx", ""), ("kernels", "kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*([prefix] if prefix else []), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = _modules()


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


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """What a module imports or spells that its floor may not."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    if module not in floor:
        return [f"{module} stands on no floor: add it to FLOORS in tests/test_layers.py"]
    tree = ast.parse(source)
    full = f"normfx.{module}".rstrip(".")
    is_package = module in ("", "kernels") or any(name.startswith(f"{module}.") for name in known)
    imports = list(_imports(tree, full if is_package else full.rpartition(".")[0]))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    wrong = []
    for statement, name, _ in imports:
        top, _, inner = name.partition(".")
        if top == "kernels":
            wrong.append(f"{module} imports {name}: installed, the folder is normfx.kernels")
        if top != "normfx":
            continue
        while inner and inner not in known:  # a name inside a module: the module is what is imported
            inner = inner.rpartition(".")[0]
        foreign = module.startswith("kernels") and not inner.startswith("kernels")
        if floor.get(inner, len(FLOORS)) >= floor[module] or foreign:
            wrong.append(f"{module} imports {name}, which does not lie above it")
        if id(statement) in inside:
            wrong.append(f"{module} imports {name} inside a function")
    if module not in PRIVATE_ROOMS:
        allowed = PRIVATE_NAMES["*"] | PRIVATE_NAMES.get(module, set())
        wrong += [f"{module} uses {n}" for n in sorted(_private(tree, imports)) if not _allows(allowed, n)]
    return wrong


def _private(tree: ast.AST, imports: list[tuple[ast.stmt, str, str]]) -> set[str]:
    """torch._x names that a module imports or spells out, also through `import torch as t` and the like."""
    local = {own: name for _, name, own in imports if own} | {"torch": "torch"}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {name for _, name, _ in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:  # a.b.c once, not a.b too
            first, _, rest = ast.unparse(node).partition(".")
            names.add(f"{local.get(first, first)}.{rest}")
    return {name for name in names if name.startswith("torch.") and _is_private(name)}


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _allows(allowed: set[str], name: str) -> bool:
    return any(
        name == ok or (name.startswith(f"{ok}.") and not _is_private(name.removeprefix(f"{ok}."))) for ok in allowed
    )


@pytest.mark.parametrize("module", list(MODULES))
def test_floor(module: str) -> None:
    assert violations(module, MODULES[module].read_text(), set(MODULES)) == []


def test_every_floor_is_lived_on() -> None:
    assert {name for names in FLOORS for name in names} == set(MODULES)
    assert set(MODULES) >= PRIVATE_ROOMS


def test_every_private_name_is_used() -> None:
    """An allowance that nothing needs any more goes away."""
    used: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        used[module] = _private(tree, list(_imports(tree, "normfx")))
    everywhere = {name for module, names in used.items() if module not in PRIVATE_ROOMS for name in names}
    idle = [
        (module, ok)
        for module, names in PRIVATE_NAMES.items()
        for ok in names
        if not any(_allows({ok}, name) for name in (everywhere if module == "*" else used[module]))
    ]
    assert idle == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("plan", "from normfx.apply import apply_plan", "does not lie above"),
        ("plan", "from .apply import apply_plan", "does not lie above"),
        ("recognize.flow", "from ..plan import make_plan", "does not lie above"),
        ("recognize.flow", "from . import norms", "does not lie above"),
        ("edit", "from normfx.weights.live import live_folds", "does not lie above"),
        ("plan", "import normfx", "does not lie above"),
        ("kernels", "import normfx.errors", "does not lie above"),
        ("kernels.spec", "from .run import forward", "does not lie above"),
        ("plan", "import kernels", "normfx.kernels"),
        ("backend", "def f():\n    from normfx.plan import Plan", "inside a function"),
        ("nowhere", "", "add it to FLOORS"),
        ("plan", "import torch._inductor.config", "torch._inductor.config"),
        ("plan", "import torch._dynamo", "torch._dynamo"),
        ("plan", "from torch._dynamo import config", "torch._dynamo.config"),
        ("explaining", "from torch._dynamo import reset_code", "torch._dynamo.reset_code"),
        ("report", "x = torch._C._set_grad_enabled", "torch._C"),
        ("report", "import torch as t\nx = t._C", "torch._C"),
        ("report", "from torch import _C as c\nx = c.Graph", "torch._C"),
        ("report", "x = torch._ops.OpOverloadPacket", "torch._ops.OpOverloadPacket"),
        ("report", "from torch.utils._pytree import _broadcast_to_and_flatten", "_broadcast_to_and_flatten"),
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
        ("report", "x = torch._ops.OpOverload"),
        ("explaining", "import torch as t\nt._dynamo.reset()"),
        ("report", "x = torch.__version__"),
    ],
)
def test_the_check_can_pass(module: str, source: str) -> None:
    assert violations(module, source, set(MODULES)) == []
