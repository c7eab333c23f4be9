"""What acts on autograd's state and leaves no op: `.data`, `requires_grad_()`; and values that a trace loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import Backend, same, x64
from equivalence import EagerBackend, assert_same_float64
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import normfx
from normfx.checks.producers import check_producers
from normfx.errors import NormfxError
from normfx.graph.regions import GET_DATA

aten = torch.ops.aten


class Model(nn.Module):
    """One norm that converts; the parameters have means."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


# ---------------------------------------------------------------- .data


class ReadsWeight(Model):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.first(x)), self.last.weight.data, self.last.bias)


class WritesWeight(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.last.weight.data.clamp_(-0.5, 0.5)
        return super().forward(x)


class ReadsStream(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.norm(h) + h.data)


class WritesStream(Model):
    """What a linear saved for backward is written to, and no version counter tells."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        y = self.last(h)
        h.data.mul_(2)
        return y + h


class WritesInput(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x * 1)
        x.data.add_(1)
        return self.last(self.norm(y)) + x


class ReturnsData(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        data = h.data
        data.add_(1)
        return self.last(self.norm(h)), data


DATA = [ReadsWeight, WritesWeight, ReadsStream, WritesStream, WritesInput, ReturnsData]


@pytest.mark.parametrize("kind", DATA)
def test_data_of_a_tensor_is_its_detached_alias(kind: type[Model]) -> None:
    """The canonical graph, by AOTAutograd: outputs, gradients, and what was written."""
    same(kind().double(), x64(4, 8, grad=True))


def _exchanged(kind: type[Model], backend: Any, **options: Any) -> None:
    """Two calls, a weight changed between them: one that the graph writes is not kept from before."""
    model, twin, x = kind().double(), kind().double(), x64(4, 8)
    twin.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    with torch.no_grad():
        for factor in (1, 3):
            mine, eager = x.clone(), x.clone()
            for both in (model, twin):
                both.last.weight.mul_(factor)
            torch.testing.assert_close(compiled(mine), twin(eager), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close([mine, *model.parameters()], [eager, *twin.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize("kind", DATA)
def test_data_with_kept_folds(kind: type[Model]) -> None:
    _exchanged(kind, EagerBackend({"fold": "cached"}))


@pytest.mark.parametrize("kind", [ReadsWeight, WritesWeight, WritesStream])
def test_data_with_frozen_weights(kind: type[Model]) -> None:
    """Inductor compiles the frozen variant, and the kept one for after the change."""
    _exchanged(kind, "normfx", options={"fold": "frozen", "strict": True})


def test_data_that_is_only_read_is_folded_into() -> None:
    backend = Backend()
    same(ReadsWeight().double(), x64(4, 8), backend=backend)
    assert backend.count(aten.detach.default) == 1 and backend.count(GET_DATA) == 0
    report = assert_same_float64(ReadsWeight(), (x64(4, 8),))
    assert report.counts["to_rms_norm"] == report.counts["fold_affine"] == 1


# ---------------------------------------------------------------- requires_grad_


class Required(Model):
    """As gradient checkpointing asks of the embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.requires_grad_(True)
        return self.last(self.norm(h + self.last(self.norm(h))))


def test_requires_grad_of_an_intermediate() -> None:
    same(Required().double(), x64(4, 8, grad=True), backend=Backend())


@pytest.fixture(scope="module")
def whole() -> bool:
    """Whether Dynamo traces `requires_grad_()` of an intermediate: torch 2.11 breaks the graph there, and what remains
    to be seen are the outputs of both parts."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(lambda x: (x + 1).requires_grad_() * 2, backend="eager", fullgraph=True)(torch.ones(2))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("fold", ["live", "cached", "frozen"])
def test_requires_grad_without_gradients_changes_nothing(fold: str, whole: bool) -> None:
    model, x = Required().double(), x64(4, 8)
    with torch.no_grad():
        backend = EagerBackend({"fold": fold})
        torch._dynamo.reset()
        got = torch.compile(model, backend=backend, fullgraph=whole)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-11, atol=1e-11)
    if whole:
        assert backend.report.counts["to_rms_norm"] == 2
    for module in backend.modules:
        assert not any(node.op == "call_method" for node in module.graph.nodes)


def test_requires_grad_stays_where_its_value_is_handed_out(whole: bool) -> None:
    flags: list[bool] = []

    @torch.compiler.allow_in_graph
    def peek(x: Tensor) -> Tensor:
        flags.append(x.requires_grad)
        return x * 2

    class Peeked(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).requires_grad_()
            return self.last(self.norm(h)) + peek(h).detach()

    with torch.no_grad():
        backend = Backend()
        torch._dynamo.reset()
        model, x = Peeked().double(), x64(4, 8)
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=whole)(x), model(x))
    if whole:
        assert [n.target for n in backend.graph.nodes if n.op == "call_method"] == ["requires_grad_"]
    assert all(flags)


def test_gradient_checkpointing_in_evaluation(whole: bool) -> None:
    """The hook by which transformers makes the embeddings require a gradient."""
    model = Model().double().eval()
    model.first.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    with torch.no_grad():
        backend = EagerBackend()
        torch._dynamo.reset()
        x = x64(4, 8)
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=whole)(x), model(x))
    if whole:
        assert backend.report.counts["to_rms_norm"] == 1


# ---------------------------------------------------------------- lost values


def _fake() -> FakeTensor:
    with FakeTensorMode():
        return torch.empty(3)


def test_a_fake_among_the_attributes_is_refused() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(aten.add.Tensor, (graph.get_attr("_tensor_constant0"), 1)))
    gm = torch.fx.GraphModule({"_tensor_constant0": _fake()}, graph)
    with pytest.raises(NormfxError, match="does not follow a value that is read at add_tensor"):
        check_producers(gm)


@pytest.mark.parametrize("lost", [_fake(), torch.ones(3)])
def test_a_tensor_in_the_arguments_is_refused(lost: Tensor) -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(aten.add.Tensor, (lost, 1)))
    with pytest.raises(NormfxError, match="does not follow a value that is read at add_tensor"):
        check_producers(torch.fx.GraphModule({}, graph))


def test_a_lost_value_falls_back_with_a_reason(monkeypatch: Any) -> None:
    """As if capture knew nothing of `.data`."""
    import normfx.capture.trace

    monkeypatch.setattr(normfx.capture.trace, "acts_on_autograd", lambda node: False)
    model, x = ReadsWeight().double(), x64(4, 8)
    torch._dynamo.reset()
    with pytest.warns(normfx.NormfxWarning, match="does not follow a value that is read at"):
        got = torch.compile(model, backend="normfx", fullgraph=True)(x)
    torch.testing.assert_close(got, model(x), rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- exported programs


@pytest.mark.parametrize("name", ["x", "input", "type", "filter"])
def test_exported_program_with_an_input_called_like_a_builtin(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self.last(self.norm(self.first({name})))", scope)
    model = type("Named", (Model,), {"forward": scope["forward"]})().double()
    x = x64(4, 8)
    program = torch.export.export(model, (x,))
    rewritten = normfx.rewrite(program, {"fold": "live"})
    assert rewritten is not program
    assert [n.name for n in rewritten.graph.nodes if n.op == "placeholder"] == [
        n.name for n in program.graph.nodes if n.op == "placeholder"
    ]
    torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-11, atol=1e-11)


def test_exported_sequential() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double(), x64(4, 8)
    rewritten = normfx.rewrite(torch.export.export(model, (x,)), {"fold": "live"})
    torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-11, atol=1e-11)
