"""The private parts of torch that normfx uses are where they were, and do what they did; a failure names what moved."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

import pytest
import torch
from paths import ROOT
from test_layers import MODULES, imports_of, private_names
from torch import nn

from normfx.compat import TRIED, dynamo, modules, operators, tensors, tracing


def names() -> list[str]:
    """Every private name that is spelled in normfx/compat."""
    found: set[str] = set()
    for module, path in MODULES.items():
        if module.startswith("compat"):
            tree = ast.parse(path.read_text())
            found |= {name.partition("(")[0] for name in private_names(tree, imports_of(module, tree, MODULES))}
    return sorted(found)


def look_up(name: str) -> Any:
    """What a dotted name stands for, modules that are not imported yet included."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            held: Any = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            held = getattr(held, part)
        return held
    raise AttributeError(name)


@pytest.mark.parametrize("name", names())
def test_is_where_it_was(name: str) -> None:
    if name.startswith("torch.ops.mkl.") and not torch.backends.mkl.is_available():
        assert not hasattr(torch.ops.mkl, name.rpartition(".")[2])
    else:
        look_up(name)


def test_a_name_that_moved_is_named() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        look_up("torch._dynamo.config.no_such_name")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (tensors.FakeTensorMode.from_tensor, {"static_shapes", "symbolic_context", "source", "trace"}),
        (tensors.FakeTensorMode.__init__, {"allow_non_fake_inputs"}),
        (tensors.FakeTensorConverter.__init__, {"copy_data", "export"}),
        (dynamo.TensorifyState.specialize, {"index"}),
        (dynamo.exc.BackendCompilerFailed.__init__, {"backend_fn", "inner_exception", "first_useful_frame"}),
    ],
)
def test_takes_what_it_took(function: Any, parameters: set[str]) -> None:
    assert parameters <= set(inspect.signature(function).parameters)


def test_versions() -> None:
    """What nox runs was tried, and so was the installed torch."""
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSIONS":
            assert set(ast.literal_eval(node.value)) - {"newest"} <= set(TRIED)
    assert ".".join(torch.__version__.split(".")[:2]) in TRIED


def test_operators() -> None:
    add_, relu = torch.ops.aten.add_.Tensor, torch.ops.aten.relu.default
    assert operators.base_name(add_) == "add_" and operators.schema(add_).is_mutable
    assert operators.namespace(torch.ops.aten.add) == "aten"
    assert operators.overload(torch.ops.aten.add, add_) is torch.ops.aten.add.Tensor
    assert operators.overload(torch.ops.aten.relu, add_) is None
    assert operators.has_kernel(relu, "Autograd") and not operators.has_kernel(relu, "CompositeImplicitAutograd")


def test_memory() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    keys = [tensors.storage_key(t.untyped_storage()) for t in (x, x[1:], x.detach(), y)]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    before = tensors.version_of(x)
    x.add_(1)
    assert tensors.version_of(x) == before + 1
    assert not tensors.is_functorch_wrapped(x)
    assert torch.func.vmap(lambda t: t.new_tensor(float(tensors.is_functorch_wrapped(t))))(x).all()


def test_modes() -> None:
    try:
        tracing.set_grad_enabled(False)
        assert not torch.is_grad_enabled()
    finally:
        tracing.set_grad_enabled(True)
    mode = tracing.enter_autocast("cpu", torch.bfloat16, True, None)
    assert torch.is_autocast_enabled("cpu")
    tracing.exit_autocast(mode)
    assert not torch.is_autocast_enabled("cpu")
    assert not tracing.functorch_is_active()
    assert torch.func.vmap(lambda t: t + tracing.functorch_is_active())(torch.zeros(2)).tolist() == [1, 1]


def test_data() -> None:
    if tracing.GET_DATA is None:
        assert not hasattr(torch._C._autograd, "_get_data_attr")
        return
    x = torch.zeros(2, requires_grad=True)
    alias = tracing.GET_DATA(x)
    alias.add_(1)
    assert x.tolist() == [1, 1] and not alias.requires_grad and tensors.version_of(x) == 0


def test_hooks_are_put_off() -> None:
    if tracing.SWITCH_HOOKS is None:
        assert not hasattr(torch._C._autograd, "_saved_tensors_hooks_set_tracing")
        return
    packed: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x

    x = torch.ones(2, requires_grad=True)
    before = tracing.SWITCH_HOOKS(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            x.exp()
    finally:
        tracing.SWITCH_HOOKS(before)
    assert packed == []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x.exp()
    assert len(packed) == 1


class Wrapped(nn.Module):
    """Dynamo before torch 2.14 leaves modules of torch.nn that are called alone as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_compiled_modules() -> None:
    model = Wrapped()
    compiled: Any = torch.compile(model, backend="eager")
    assert modules.original(compiled) is model and modules.original(model) is model
    model.compile(backend=lambda gm, _: lambda *args: (torch.full((1, 2), 7.0),))
    x = torch.zeros(1, 2)
    with torch.no_grad():
        assert model(x).tolist() == [[7, 7]]
        with modules.uncompiled(model):
            assert model(x).tolist() != [[7, 7]]
        assert model(x).tolist() == [[7, 7]]


def test_what_dynamo_says() -> None:
    """Dynamo says where each input comes from, and the id of the compilation."""
    seen: dict[str, Any] = {}

    def backend(gm: torch.fx.GraphModule, _: object) -> Any:
        seen["id"] = dynamo.compile_id()
        seen["inputs"] = [dynamo.input_source(node) for node in gm.graph.find_nodes(op="placeholder")]
        return gm.forward

    model = nn.Linear(2, 2)
    torch.compile(model, backend=backend)(torch.zeros(1, 2))
    assert seen["id"].count("/") == 1 and dynamo.compile_id() == ""
    assert all(source is not None for source in seen["inputs"])
    known = [dynamo.is_from_unspecialized_param_buffer_source(source) for source in seen["inputs"]]
    assert sum(known) in (0, 2)  # inputs of the graph, or attributes of it


def test_breaks_are_recorded() -> None:
    before = len(dynamo.graph_break_reasons())

    @torch.compile(backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x + 1

    broken(torch.zeros(2))
    assert len(dynamo.graph_break_reasons()) > before
