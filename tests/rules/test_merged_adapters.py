"""Adapters next to a layer, by themselves, of peft and among the other rules; and convolutions of timm's models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from branch_nets import Adapted, Rows, decided
from equivalence import EagerBackend, assert_same_float64, transformed
from folding import KEPT, check, compiled, net
from rule_test import moved, rows
from torch import Tensor, nn

import normfx
from normfx.survey.family import calibrated


class Block(nn.Module):
    """Two residual branches whose layers are adapted, their norms, a last norm and a head."""

    def __init__(self, kind: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.up = nn.ModuleList(Adapted(kind(8, 12), 8, 12) for _ in range(2))
        self.down = nn.ModuleList(Adapted(kind(12, 8), 12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        out: Tensor = self.head(self.norms[2](x))
        return out


OPTIONS: list[dict[str, str]] = [
    {},
    {"rules": "all", "crms_basis": "drop"},
    {"rules": "all", "crms_basis": "orthonormal", "defer_means": "small"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Rows])
def test_among_the_other_rules(kind: Callable[[int, int], nn.Module], options: dict[str, str]) -> None:
    """Adapted readers take γ and β, adapted writers lose the mean of the stream; then they are one."""
    torch.manual_seed(0)
    model = moved(Block(kind)).eval().requires_grad_(False)
    report = assert_same_float64(model, (rows(4, 6, 5),), {"fold": "cached", **options})
    assert all("pre_rms_norm" in site.rules for site in report.sites)
    assert decided(report) == ["applied"] * 4


def test_with_gradients_of_the_input() -> None:
    """Weights that are not trained are kept; what is read has its gradient."""
    torch.manual_seed(0)
    model = moved(Block(nn.Linear)).requires_grad_(False)
    assert decided(assert_same_float64(model, (rows(4, 6, 5),), {"fold": "auto"})) == ["applied"] * 4


@pytest.mark.parametrize("fold", ["auto", "cached", "live"])
def test_trained(fold: str) -> None:
    torch.manual_seed(0)
    model = moved(Block(nn.Linear)).train()
    model.requires_grad_(False)
    for adapted in (*model.up, *model.down):
        adapted.down.weight.requires_grad_()
    report = assert_same_float64(model, (rows(4, 6, 5),), {"fold": fold})
    assert decided(report) == ["live_weights"] * 4


def test_dynamic_sizes() -> None:
    torch.manual_seed(0)
    model = moved(Block(Rows)).double().eval()
    call = torch.compile(model, backend="normfx", fullgraph=True, dynamic=True, options={"strict": True})
    with torch.no_grad():
        for n in (3, 5):
            x = rows(4, n, 5).double()
            torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fold", KEPT)
def test_adapters_of_peft(fold: str) -> None:
    """Two adapters, merged and unmerged, chosen and written: the next call is right."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=8, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(net(), config)
    model.add_adapter("other", config)
    model = model.double().eval()
    call = compiled(model, fold)
    before = check(call, model)
    for change in (
        lambda: model.set_adapter("other"),
        lambda: model.base_model.model.up.lora_B["other"].weight.data.mul_(3.0),
        lambda: model.base_model.model.up.base_layer.weight.data.add_(0.5),
        lambda: model.set_adapter("default"),
    ):
        change()
        before = check(call, model, before)
    model.merge_adapter()
    check(call, model)
    model.unmerge_adapter()
    check(call, model)


def test_adapters_of_gpt2() -> None:
    """The Conv1D of transformers multiplies rows in two dimensions."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, use_cache=False)
    lora = peft.LoraConfig(
        target_modules=["c_attn", "c_proj", "c_fc"], r=2, init_lora_weights=False, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    model = moved(peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)).eval().requires_grad_(False)
    ids = torch.arange(12).reshape(2, 6)
    report = assert_same_float64(model, (ids,), {"fold": "cached"})
    assert decided(report) == ["applied"] * 8
    assert all("pre_rms_norm" in site.rules for site in report.sites)


@pytest.mark.parametrize(
    ("fold", "expected"), [("frozen", "applied"), ("live", "live_weights"), ("auto", "live_weights")]
)
def test_exported_program(fold: str, expected: str) -> None:
    """A constant for each merged weight; where it would be computed in each run the branches stay."""
    torch.manual_seed(0)
    model, x = moved(Block(Rows)).double().eval(), rows(4, 6, 5).double()
    with torch.no_grad():
        program, report = normfx.rewrite(torch.export.export(model, (x,)), {"fold": fold}, report=True)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)
    assert decided(report) == [expected] * 4
    assert any(name.startswith("up.0.down") for name in program.state_dict) == (expected != "applied")


def test_it_is_off_without_the_rule() -> None:
    torch.manual_seed(0)
    model = moved(Block(nn.Linear)).eval().requires_grad_(False)
    report = transformed(model, (rows(4, 6, 5),), {"fold": "cached", "rules": "none"})[1]
    assert decided(report) == ["disabled"] * 4


SHARES = {
    ("repvgg_a0", "equal"): (0, 22),
    ("repvgg_a0", "any"): (22, 22),
    ("mobileone_s0", "equal"): (42, 43),
    ("mobileone_s0", "any"): (43, 43),
}
"""Sums of branches in models of timm: those that are merged, at least in part, and all; as docs/rules.md has them."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), SHARES)
def test_models(name: str, kernels: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    calibrated(model, (x,))
    torch._dynamo.reset()
    backend = EagerBackend({"fold": "cached", "merge_kernels": kernels})
    with torch.no_grad():
        call = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(call(x), model(x), rtol=1e-9, atol=1e-9)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.02)
                module.weight.data.mul_(1.01)
        torch.testing.assert_close(call(x), model(x), rtol=1e-9, atol=1e-9)
    said = decided(backend.report)
    assert (said.count("applied"), len(said)) == SHARES[name, kernels]
