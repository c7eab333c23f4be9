"""Sums of residual streams that are stored once: which, what it saves, and that training does not see it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from equivalence import EagerBackend
from torch import Tensor, nn
from torch._inductor.graph import GraphLowering

from normfx.backend import normfx
from normfx.lower import stored as lowering
from normfx.lower.stored import STORED

WIDTH = 32


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes storing pay, as it does on a GPU."""
    monkeypatch.setattr(lowering, "pays", lambda total: True)


class Stream(nn.Module):
    """x + f₁(norm x) + f₂(norm …) …, each f a product. case: what is different about one of the sums, or all."""

    def __init__(self, sums: int = 6, case: str = "", norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.case = case
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(sums))
        self.products = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(sums))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        middle = None
        for i, (norm, product) in enumerate(zip(self.norms, self.products, strict=True)):
            f = torch.tanh(norm(x)) if self.case == "no products" else product(norm(x))
            x = x + (f[:1] if self.case == "broadcast" else f)
            if self.case == "written" and i == 2:
                x.mul_(0.5)
            middle = x if i == 2 else middle
        out = self.last(x)
        return (out, middle) if self.case == "returned" else out


def stored(model: nn.Module, shape: tuple[int, ...] = (2, 4, WIDTH), dynamic: bool = False, **options: Any) -> int:
    """How many sums of a model are stored without gradients; the rewritten model equals eager in float64."""
    model = model.double().eval()
    backend = EagerBackend({"lowering": "inductor", **options})
    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch in (shape[0], 3, 5) if dynamic else shape[:1]:
            x = torch.randn(batch, *shape[1:], dtype=torch.float64)
            torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(backend.graphs) == 1
    count = sum(node.target is STORED for node in backend.modules[0].graph.nodes)
    assert backend.graphs[0].stored_sums == count
    assert ("of residual streams stored once" in str(backend.report)) is (count > 0)
    return count


@pytest.mark.parametrize("fold", ["live", "cached"])
@pytest.mark.parametrize("rules", ["default", "pre_rms_norm", "crms_norm"])
def test_streams(rules: str, fold: str) -> None:
    """All sums but the last, whichever rules apply: with fused adds, with none, and where no norm is rewritten."""
    assert stored(Stream(), rules=rules, fold=fold) == 5


@pytest.mark.parametrize(
    ("sums", "case", "count"),
    [
        (1, "", 0),
        (2, "", 0),  # as many bytes
        (3, "", 2),
        (6, "no products", 0),  # one kernel could compute it all
        (6, "broadcast", 0),  # what is added is smaller than the sum: adding again is cheaper
        (6, "returned", 4),  # two streams of three, since the third sum is in memory anyway
        (6, "written", 4),
    ],
)
def test_which_sums(sums: int, case: str, count: int) -> None:
    assert stored(Stream(sums, case)) == count


@pytest.mark.parametrize(
    ("reader", "count"),
    [
        (nn.RMSNorm, 5),
        (lambda width: nn.Tanh(), 5),
        (lambda width: nn.Identity(), 0),
    ],
)
def test_readers(reader: Any, count: int) -> None:
    """Products read what is in memory."""
    assert stored(Stream(norm=reader)) == count


def test_dynamic_batch() -> None:
    assert stored(Stream(), dynamic=True) == 5


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert stored(Stream()) == 0


def test_without_rules_or_norms() -> None:
    assert stored(Stream(), rules="none") == 0
    model = Stream(norm=lambda width: nn.Tanh())
    model.last = nn.Tanh()
    assert stored(model) == 0


@pytest.mark.parametrize("rules", ["default", "crms_norm"])
@pytest.mark.parametrize("frozen", [True, False])
def test_training_is_as_it_was(frozen: bool, rules: str) -> None:
    """Where gradients are recorded nothing is stored, and a graph that no rule touches is Dynamo's own."""
    model, backend = Stream().requires_grad_(not frozen), EagerBackend({"rules": rules, "lowering": "inductor"})
    graphs: list[Any] = []

    def both(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return backend(gm, inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=both, fullgraph=True)(torch.randn(2, 4, WIDTH))
    assert backend.graphs[0].stored_sums == 0
    assert all(node.target is not STORED for node in backend.modules[0].graph.nodes)
    if rules == "crms_norm":
        assert backend.modules[0] is graphs[0]


class _Enough(Exception):
    """The code is generated; it need not be compiled."""


def traffic(model: nn.Module, x: Tensor, rules: str) -> tuple[int, int]:
    """Bytes that Inductor's kernels move by its own count, and how many kernels there are."""
    found: list[tuple[int, int]] = []

    def generate(graph: GraphLowering) -> Any:
        graph.codegen()
        assert graph.scheduler is not None
        kernels = sum(not node.is_extern() for node in graph.scheduler.nodes)
        found.append((int(graph.count_bytes()[0]), kernels))
        raise _Enough

    def compile_only(gm: Any, inputs: Any) -> Any:
        try:
            return normfx(gm, inputs, options={"strict": True, "fold": "live", "rules": rules})
        except Exception:
            assert found
            return gm.forward

    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch.object(GraphLowering, "compile_to_module", generate),
    ):
        torch.compile(model, backend=compile_only, fullgraph=True)(x)
    ((moved, kernels),) = found
    return moved, kernels


def test_bytes() -> None:
    """Six sums read 2 + 3 + 4 + 5 + 2 + 3 operands and write one of them; stored, they read 6 · 2 and write 5. The
    readers are pointwise here: on a CPU, other than on a GPU, a sum has a kernel of its own before a norm."""
    model, x = Stream(norm=lambda width: nn.Tanh()), torch.randn(64, WIDTH)
    plain, kernels = traffic(model, x, "none")
    moved, as_many = traffic(model, x, "crms_norm")
    assert (plain - moved, as_many) == (3 * x.nbytes, kernels)
