"""lowering="triton" on real models. The op runs as ATen here: what it means on a GPU is tested with the kernels."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from checkpoints import Layer, Partitioned, Stack, checkpointed, ids
from equivalence import EagerBackend, assert_same_float64
from models import named

from normfx.lower import inductor
from normfx.lower import triton as lowering
from normfx.lower.norm_ops import NORM

TRITON = {"lowering": "triton", "fold": "live"}


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels for the CPU."""
    monkeypatch.setattr(lowering, "has_kernels", lambda fake: True)


ADDS = {
    "gpt2": 4, "vit": 4, "torchvision vit": 4, "llama": 4, "gpt_neox parallel": 3, "encoder": 4, "bloom": 4,
}  # fmt: skip
"""Norms that read a residual add of their own, of each model."""


@pytest.mark.parametrize(("name", "adds"), ADDS.items())
def test_float64(name: str, adds: int) -> None:
    """Output and every gradient; residual adds are taken into the op, and their sums out of it."""
    case = named(name)
    report = assert_same_float64(case.make(), case.inputs(), TRITON, promoted=case.promoted)
    kernels = [site.lowering for site in report.sites]
    assert all(k.startswith("triton: ") for k in kernels)
    assert sum(k.startswith("triton: add_") for k in kernels) == adds
    (graph,) = report.graphs
    assert {name.rpartition("_")[2] for name in graph.kernels} == {"forward", "backward"}
    assert all("@triton.jit" in source for source in graph.kernels.values())


@pytest.mark.parametrize("basis", ["orthonormal", "drop"])
def test_compressed_streams(basis: str) -> None:
    """All norms and adds of a stream of width d − 1, in either basis."""
    case = named("gpt2")
    options = {**TRITON, "rules": "default,+crms_norm", "crms_basis": basis, "crms_width": "exact"}
    report = assert_same_float64(case.make(), case.inputs(), options)
    kind = "crms_norm_32" if basis == "drop" else "rms_norm_31"
    assert [site.lowering.partition(",")[0] for site in report.sites] == [
        f"triton: {kind}",
        *[f"triton: add_{kind}"] * 4,
    ]


class Adds(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.norm, self.read = case, nn.LayerNorm(8), nn.Linear(8, 8)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        if self.case == "broadcast":
            s = x + f[:1]
        elif self.case == "a number":
            s = torch.add(x, 2.0)
        elif self.case == "scaled":
            s = torch.add(x, f, alpha=0.5)
        elif self.case == "another dtype":
            s = x + f.float()
        elif self.case == "written before the norm":
            s = x + f
            s.mul_(2.0)
        elif self.case == "without gradients":
            with torch.no_grad():
                s = x + f
        elif self.case == "in a checkpoint":
            s = checkpoint(torch.add, x, f, use_reentrant=False)
        else:
            s = x + f
        early = torch.tanh(s) if self.case == "read before" else s
        return self.read(self.norm(s)), early * 1.0


@pytest.mark.parametrize(
    ("case", "fused"),
    [
        ("plain", True), ("scaled", True), ("read before", True), ("broadcast", False), ("a number", False),
        ("another dtype", True), ("written before the norm", False), ("without gradients", False),
        ("in a checkpoint", False),
    ],
)  # fmt: skip
def test_which_adds(case: str, fused: bool) -> None:
    x, f = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    report = assert_same_float64(Adds(case), (x, f), TRITON)
    (site,) = report.sites
    assert site.lowering.startswith("triton: add_layer_norm_8, " if fused else "triton: layer_norm_8, ")


class Written(nn.Module):
    """A residual add of what a linear layer writes, in several surroundings, and a norm of the sum."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.norm, self.read = case, nn.LayerNorm(8), nn.Linear(8, 8)
        self.write = nn.Linear(8, 8, bias=case != "no bias")
        self.square = nn.Parameter(torch.randn(8, 8))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        if case == "frozen":
            self.write.requires_grad_(False)

    def forward(self, x: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        written = self.write(f)
        if self.case == "two readers":
            return self.read(self.norm(x + written)), written * 2.0
        if self.case == "an op between":
            written = torch.tanh(written)
        elif self.case == "a transpose between":
            written = written.transpose(1, 2)
        elif self.case == "rows cut otherwise":
            written = written.flatten(1).unflatten(1, (4, 16)).reshape(2, 8, 8)
        elif self.case == "addmm":
            written = torch.addmm(self.write.bias, f.flatten(0, 1), self.square).view(2, 8, 8)
        elif self.case == "scaled addmm":
            written = torch.addmm(self.write.bias, f.flatten(0, 1), self.square, beta=0.5).view(2, 8, 8)
        elif self.case == "written with no_grad":
            with torch.no_grad():
                written = self.write(f)
        elif self.case == "bias written before the norm":
            written = self.write(f) * 1.0
            with torch.no_grad():
                self.write.bias.add_(1.0)
        elif self.case == "a computed bias":
            written = torch.nn.functional.linear(f, self.write.weight, self.write.bias * self.square[0])
        elif self.case == "wide addmm":
            written = torch.addmm(self.square, f[0], self.square).unsqueeze(0).expand(2, 8, 8)
        elif self.case in ("skip scaled", "branch scaled"):
            operands = (written, x) if self.case == "skip scaled" else (x, written)
            return self.read(self.norm(torch.add(*operands, alpha=0.5))), x * 1.0
        return self.read(self.norm(x + written)), x * 1.0


@pytest.mark.parametrize(
    ("case", "taken"),
    [
        ("plain", True), ("addmm", True), ("a computed bias", True), ("no bias", False), ("frozen", False),
        ("two readers", False), ("an op between", False), ("a transpose between", False),
        ("rows cut otherwise", False), ("scaled addmm", False), ("written with no_grad", False),
        ("bias written before the norm", False), ("wide addmm", False), ("skip scaled", True),
        ("branch scaled", False),
    ],
)  # fmt: skip
def test_which_biases_of_writers(case: str, taken: bool) -> None:
    """The bias of the layer that writes a branch is added by the norm's kernel, whose backward sums its gradient."""
    x, f = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    report = assert_same_float64(Written(case), (x, f), TRITON)
    (site,) = report.sites
    (graph,) = report.graphs
    backward = next(source for name, source in graph.kernels.items() if name.endswith("_backward"))
    assert ("x_bias_sums_ptr" in backward) == taken, site.lowering


@pytest.mark.parametrize("call", [checkpointed, pytest.param(Layer.__call__, marks=pytest.mark.slow)])
def test_checkpointed_layers(call: Any) -> None:
    """The op of a region takes in no add of another region: backward is left with as little, and computes as many
    products again, those without a bias whose kernel adds it."""
    plain = Partitioned(640, None).run(Stack(call, depth=3).double(), ids(1, 640))
    rewritten = Partitioned(640, {"lowering": "triton"}).run(Stack(call, depth=3).double(), ids(1, 640))
    assert rewritten.saved_activations <= plain.saved_activations
    products = torch.ops.aten.addmm.default, torch.ops.aten.mm.default
    again, wanted = (sum(map(graphs.recomputed, products)) for graphs in (rewritten, plain))
    assert again == wanted


class Other(nn.Module):
    """A norm for which there is no kernel, in a graph in which another norm is rewritten."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.enter, self.norm, self.read = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        if self.case == "ε outside":
            y = h * (1 / (h.square().mean(-1, keepdim=True).sqrt() + 1e-5)) * self.norm.weight
        else:
            t = h.transpose(1, 2)
            y = (t * torch.rsqrt(t.square().mean(1, keepdim=True) + 1e-5) * self.norm.weight[:, None]).transpose(1, 2)
        return self.read(y)


@pytest.mark.parametrize(("case", "why"), [("ε outside", "ε is added to the root"), ("other axis", "last dimension")])
def test_no_kernel(case: str, why: str) -> None:
    report = assert_same_float64(Other(case), (torch.randn(2, 3, 8),), TRITON)
    (site,) = report.sites
    assert site.rules and site.lowering.startswith("inductor: ") and why in site.lowering


def test_on_the_cpu_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    report = assert_same_float64(model, (torch.randn(3, 8),), TRITON)
    assert report.sites[0].lowering == "inductor: there are no kernels for torch.float64 on cpu"
    assert report.graphs[0].kernels == {}


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    report = assert_same_float64(model, (torch.randn(3, 8),), TRITON)
    assert report.sites[0].lowering == "inductor: triton is not installed"


@pytest.mark.filterwarnings("ignore:normfx. lowering='triton' has no effect:normfx.NormfxWarning")
@pytest.mark.parametrize("training", [True, False])
def test_under_inductor(training: bool) -> None:
    """AOTAutograd and Inductor take the op and its derivative."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    call = torch.compile(model, backend="normfx", fullgraph=True, options={**TRITON, "strict": True})
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(call(x), model(x))
    if training:
        own, want = (torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (call, model))
        torch.testing.assert_close(own, want)


def test_dynamic_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    backend = EagerBackend(TRITON)
    call = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 5, 9):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(call(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(backend.graphs) == 1
    assert any(node.target is NORM for node in backend.modules[0].graph.nodes)


def test_statistics_of_functional_norms() -> None:
    """F.layer_norm without weights: a kernel without γ and β."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(F.layer_norm(self.enter(x), (8,)))

    report = assert_same_float64(Plain(), (torch.randn(3, 8),), TRITON)
    # float32 is assumed in float64's place: 3 rows of 8 read and written, rstd; dy, x and dx, rstd
    assert report.sites[0].lowering == "triton: rms_norm_8, 204 bytes forward, 300 backward"
    assert "weight_ptr" not in "".join(report.graphs[0].kernels.values())


@pytest.mark.parametrize("inner", [False, True])
def test_no_statistics_without_gradients(inner: bool) -> None:
    """None are written where none are read: 4 or 8 bytes a row."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.read = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            self.norm, self.first = nn.LayerNorm(8), nn.RMSNorm(8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            f = self.enter(x)
            s = x + (self.first(f) if inner else f)
            return self.read(self.norm(s)), torch.tanh(s)

    options = {**TRITON, "rules": "fuse_residual_norm"}
    x = torch.randn(3, 8)
    recorded = assert_same_float64(Norms(), (x,), options)
    model, backend = Norms().double().requires_grad_(False), EagerBackend(options)
    with torch.no_grad():
        call = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(call(x.double()), model(x.double()), rtol=1e-12, atol=1e-12)
    (graph,), (trained,) = backend.graphs, recorded.graphs
    (kernel,) = graph.kernels.values()
    assert "rstd_ptr" not in kernel and any("rstd_ptr" in source for source in trained.kernels.values())
    read = [int(g.sites[-1].lowering.split(", ")[1].split()[0]) for g in (graph, trained)]
    assert read[1] - read[0] == 3 * 4 * (2 + inner)


def test_no_sum_that_nothing_reads() -> None:
    """The last norm of a stream, without gradients: 4 bytes an entry less. With them, backward reads the sum."""

    class Last(nn.Module):
        def __init__(self, read: bool) -> None:
            super().__init__()
            self.enter, self.norm, self.read = nn.Linear(8, 8), nn.LayerNorm(8), read
            self.before = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            s = x + self.enter(torch.tanh(self.before(x)))
            return (torch.tanh(self.norm(s)), torch.tanh(s)) if self.read else (torch.tanh(self.norm(s)),)

    options = {**TRITON, "rules": "fuse_residual_norm"}
    x, kernels, sizes = torch.randn(3, 8), [], []
    for read in (False, True):
        model, backend = Last(read).double().requires_grad_(False), EagerBackend(options)
        with torch.no_grad():
            found = torch.compile(model, backend=backend, fullgraph=True)(x.double())
            torch.testing.assert_close(found, model(x.double()), rtol=1e-12, atol=1e-12)
        kernels += [text for name, text in backend.graphs[0].kernels.items() if "add" in name]
        sizes.append(int(backend.graphs[0].sites[-1].lowering.split(", ")[1].split()[0]))
    assert ["sum_ptr" in kernel for kernel in kernels] == [False, True]
    assert sizes[1] - sizes[0] == 3 * 8 * 4
    trained = assert_same_float64(Last(False), (x,), options)
    assert any("sum_ptr" in source for source in trained.graphs[0].kernels.values())


@pytest.mark.parametrize("module", inductor.MEANING, ids=lambda m: m.__name__)
def test_caches_know_what_the_ops_mean(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text of any module that decides what an op compiles to is another key."""
    digest, read = inductor._digest.__wrapped__, inspect.getsource
    before = digest()
    assert digest() == before
    monkeypatch.setattr(inspect, "getsource", lambda m: read(m) + ("#" if m is module else ""))
    assert digest() != before
