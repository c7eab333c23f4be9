"""Who runs a norm of a CUDA graph, decided on fake tensors: captured, rewritten and lowered, not run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from normfx.backend import transform
from normfx.kernels import run
from normfx.lower import choice
from normfx.lower.folded import fed
from normfx.options import Options
from normfx.report import GraphReport

DEVICE = "this cuda device"  # what it is called where there is none


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device of 132 multiprocessors on which the kernels have passed their tests. Every norm becomes a
    canonical op, so that its report says both predictions."""
    monkeypatch.setattr(run, "processors", lambda device: 132)
    monkeypatch.setattr(choice, "TESTED", frozenset({DEVICE}))
    monkeypatch.setattr(choice, "promising", lambda norm, order: True)


def report(make: Callable[[], tuple[nn.Module, Tensor]], dynamic: bool | None = None, **options: Any) -> GraphReport:
    """Of the only graph of a model made on a fake CUDA device, in bfloat16."""
    found: list[GraphReport] = []
    settings = Options.parse({"strict": True, **options})

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        ready = transform(gm, inputs, settings)
        found.append(ready.report)
        run = ready.graph_module.forward
        return fed(run, ready.folding) if ready.folding else run

    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            model, x = make()
            torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    (only,) = found
    return only


class Norm(nn.Module):
    """A norm between products; `around`: what stands between it and them."""

    def __init__(self, norm: nn.Module, width: int, around: str = "") -> None:
        super().__init__()
        self.around, self.norm = around, norm
        self.enter, self.read = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Any:
        h = self.enter(x)
        if self.around == "producer":
            h = torch.nn.functional.gelu(h)
        if self.around == "residual":
            h = h + self.enter(x * 2.0)
        y = self.norm(h.view(h.shape) if self.around == "view" else h)
        if self.around == "reader":
            y = torch.relu(y)
        if self.around == "two readers":
            return self.read(y), torch.relu(y)
        return self.read(y)


def lowering(
    rows: int,
    width: int,
    norm: Callable[[int], nn.Module] = nn.RMSNorm,
    around: str = "",
    training: bool = True,
    **options: Any,
) -> str:
    def make() -> tuple[nn.Module, Tensor]:
        return Norm(norm(width), width, around), torch.randn(rows, 8)

    with torch.set_grad_enabled(training):
        (site,) = report(make, **{"rules": "default,-fold_affine,-linear_norm", **options}).sites
    return site.lowering


def plain(width: int) -> nn.Module:
    return nn.RMSNorm(width, elementwise_affine=False)


@pytest.mark.parametrize(
    ("rows", "width", "norm", "kernel"),
    [
        (2048, 4096, nn.RMSNorm, True),  # too few rows for Inductor's fusion of dx and dγ
        (2048, 4096, nn.LayerNorm, True),
        (2048, 4096, plain, False),  # no dγ: Inductor reads x and dy once as well
        (8192, 1024, nn.RMSNorm, False),  # in the fusion's window
        (4096, 32768, nn.RMSNorm, True),  # too wide for it
        (4096, 65536, nn.LayerNorm, False),  # the kernels read x and dy twice too
        (2048, 768, nn.RMSNorm, False),  # x and dy are still in the L2 cache
    ],
)
def test_bytes_decide(rows: int, width: int, norm: Callable[[int], nn.Module], kernel: bool) -> None:
    text = lowering(rows, width, norm)
    assert text.startswith("triton: " if kernel else "inductor: predicted "), text


def test_flat_rows_are_fused_since_torch_2_15() -> None:
    text = lowering(4096, 4096)
    assert text.startswith("inductor: " if choice._FLAT_TOO else "triton: ")


def test_predicted_bytes() -> None:
    """Forward 2Nds, rstd and γ; backward 3Nds, rstd, γ, and its gradient; on a kernel the partial sums of dγ too, a
    row for each of four programs of 132 multiprocessors, written and read. In the window Inductor adds nothing."""
    n, d = 8192, 1024
    moved = (2 * n * d * 2 + 4 * n + 2 * d) + (3 * n * d * 2 + 4 * n + 2 * d + 2 * d)
    partial = 2 * 4 * 132 * d * 4
    assert lowering(n, d) == f"inductor: predicted as long as {moved:,} bytes take, on a kernel {moved + partial:,}"


@pytest.mark.parametrize(
    ("around", "kernel"),
    [("", True), ("view", True), ("residual", True), ("producer", False), ("reader", False), ("two readers", False)],
)
def test_neighbours(around: str, kernel: bool) -> None:
    """GELU before the norm, or ReLU after it, would be computed in Inductor's kernel. Next to a kernel they move 2Nds
    each, forward and backward, more than a second read of x and dy; a second reader moves half of it, and ties lose."""
    text = lowering(2048, 4096, around=around)
    assert text.startswith("triton: ") is kernel, text


class Stream(nn.Module):
    """Residual branches: a product of the skip goes into the sum, so that no kernel could compute both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up[0](x)
        for norm, down, up in zip(self.norms, self.down, self.up, strict=True):
            h = h + up(torch.relu(down(norm(h))))
        return h * 2.0


def test_residual_stream() -> None:
    def make() -> tuple[nn.Module, Tensor]:
        return Stream(4096), torch.randn(2048, 8)

    sites = report(make, rules="default,-fold_affine,-pre_rms_norm").sites
    kinds = [site.lowering.partition(",")[0] for site in sites]
    assert kinds == ["triton: layer_norm_4096", *["triton: add_layer_norm_4096"] * 2]


def test_without_gradients_inductor_is_never_behind() -> None:
    assert lowering(2048, 4096, training=False).startswith("inductor: predicted ")


def test_without_inductors_fusion() -> None:
    with torch._inductor.config.patch({"triton.mix_order_reduction": False}):
        assert lowering(8192, 1024).startswith("triton: ")


def test_on_an_untested_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that no rule touches is left as it is; of another one is said why it has no kernel."""
    monkeypatch.setattr(choice, "TESTED", frozenset({"sm_90"}))
    assert lowering(2048, 4096) == "inductor"
    assert lowering(2048, 4096, lowering="triton").startswith("triton: ")
    monkeypatch.setattr(choice, "may_run", lambda lowering: lambda norm: True)  # as of a norm that a rule rewrote
    text = lowering(2048, 4096)
    assert text.endswith("but the kernels were not tested on this cuda device: lowering='triton' uses them")


MEASURED = pytest.mark.parametrize(
    ("rows", "width", "norm", "around", "kernel"),
    [
        (8192, 768, nn.LayerNorm, "", True),
        (8192, 768, nn.RMSNorm, "residual", True),
        (12608, 384, nn.LayerNorm, "", True),
        (16384, 4096, nn.RMSNorm, "", True),
        (16384, 4096, plain, "", False),  # no sums: level
        (1024, 768, nn.LayerNorm, "", False),  # fewer rows than were measured
        (8192, 4096, nn.LayerNorm, "reader", False),  # what the neighbour costs is more
        (8192, 4096, nn.LayerNorm, "producer", False),
    ],
)


@MEASURED
def test_what_was_measured_decides(
    rows: int, width: int, norm: Callable[[int], nn.Module], around: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside Inductor's window, where bytes speak for Inductor."""
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])
    text = lowering(rows, width, norm, around)
    assert text.startswith("triton: " if kernel else "inductor: predicted "), text


@MEASURED
def test_a_norm_without_a_kernel_stays_as_it_was_written(
    rows: int, width: int, norm: Callable[[int], nn.Module], around: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's code for the canonical op moves more bytes for some, Llama's under autocast."""
    monkeypatch.undo()
    monkeypatch.setattr(run, "processors", lambda device: 132)
    monkeypatch.setattr(choice, "TESTED", frozenset({DEVICE}))
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])
    text = lowering(rows, width, norm, around)
    assert text.startswith("triton: ") if kernel else text == "inductor"


def test_what_was_measured_is_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])

    def make() -> tuple[nn.Module, Tensor]:
        torch.set_default_dtype(torch.float32)
        return Norm(nn.LayerNorm(768), 768), torch.randn(8192, 8)

    (site,) = report(make, rules="default,-fold_affine,-linear_norm").sites
    assert site.lowering.startswith("inductor: predicted ")


@pytest.mark.parametrize("around", ["producer", "reader", "two readers"])
def test_what_was_measured_is_of_norms_between_products(around: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])
    assert lowering(8192, 768, nn.LayerNorm, around).startswith("inductor: predicted ")


def test_a_cast_of_autocast_is_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph does not show it: a product of float32 rows that returns bfloat16. Next to a kernel the rows are
    written in float32 and read again, and so is their gradient."""
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        text = lowering(8192, 768, nn.LayerNorm)
    finally:
        torch.set_autocast_enabled("cuda", False)
    inductor, kernel = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{5,}", text))
    assert text.startswith("inductor: predicted ") and kernel - inductor > 2 * 2 * 8192 * 768 * 4, text


def test_what_was_measured_is_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.MEASURED, DEVICE, choice.MEASURED["sm_90"])
    assert lowering(8192, 768, nn.LayerNorm, training=False).startswith("inductor: predicted ")


def test_symbolic_rows() -> None:
    """Decided at the sizes seen when the graph was captured."""

    def make() -> tuple[nn.Module, Tensor]:
        return Norm(nn.RMSNorm(4096), 4096), torch.randn(2048, 8)

    (site,) = report(make, dynamic=True).sites
    assert site.lowering.startswith("triton: rms_norm_4096, ") and "s" in site.lowering.partition(", ")[2]


def test_llama_in_training() -> None:
    """bfloat16 weights keep γ in the norms: all of them run on kernels, each residual add that can be with them."""
    transformers = pytest.importorskip("transformers")

    def make() -> tuple[nn.Module, Tensor]:
        config = transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            max_position_embeddings=64, attn_implementation="sdpa",
        )  # fmt: skip

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.llama = transformers.LlamaForCausalLM(config)

            def forward(self, ids: Tensor) -> Tensor:
                out: Tensor = self.llama(ids, use_cache=False).logits
                return out

        return Logits(), torch.zeros(2, 32, dtype=torch.int64)

    sites = report(make, lowering="triton").sites
    assert len(sites) == 5
    assert all(site.lowering.startswith(("triton: rms_norm_2048", "triton: add_rms_norm_2048")) for site in sites)


# ---------------------------------------------------------------- what rules cost on a GPU


def blocks(rows: int = 4096, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Tensor]:
    def linear(width: int, out: int) -> nn.Module:
        return nn.Linear(width, out, dtype=dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(256, dtype=dtype), linear(256, 512), linear(512, 256)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    model = nn.Sequential(linear(8, 256), Block(), Block(), nn.LayerNorm(256, dtype=dtype), linear(256, 8))
    return model, torch.randn(rows, 8, dtype=dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [64, 4096, 2**20])
def test_live_folds_do_not_pay(rows: int, training: bool) -> None:
    """A GPU reads a row once for a LayerNorm and for an RMSNorm: nothing pays for a weight centred in each call."""
    with torch.set_grad_enabled(training):
        sites = report(lambda: blocks(rows), lowering="inductor").sites
    for site in sites:
        assert "pre_rms_norm" not in site.rules and site.kind == "LayerNorm"
        assert any(r.rule == "pre_rms_norm" and r.code == "live_weights" for r in site.refusals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fold", ["live", "cached"])
def test_layer_norms_without_a_kernel_stay_whole(fold: str, dtype: torch.dtype) -> None:
    """Inductor's own form of `aten.layer_norm` has one row loop less than the canonical one. γ and β may have moved."""
    rules = "fold_affine,fuse_residual_norm"
    with torch.no_grad():
        found = report(lambda: blocks(dtype=dtype), fold=fold, rules=rules, lowering="inductor")
    if fold == "cached" and dtype == torch.float32:
        assert all(site.rules == ("fold_affine",) for site in found.sites)
    norms = [line for line in found.after.splitlines() if "layer_norm" in line]
    assert len(norms) == 3 and all(re.search(r"= layer_norm\(%\d+, \[256\]", line) for line in norms), norms


def test_kept_folds_are_free() -> None:
    with torch.no_grad():
        sites = report(blocks, fold="cached", lowering="inductor").sites
    assert all("pre_rms_norm" in site.rules for site in sites)
