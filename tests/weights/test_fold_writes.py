"""Kept and frozen folds are true to the parameters of every call, whatever wrote them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folding import KEPT, X, check, compiled, folding, net
from torch import nn
from writes import FUSED, WRITES, give_gradients


@pytest.mark.parametrize("fold", KEPT)
@pytest.mark.parametrize("name", WRITES)
def test_next_call_after_a_write(name: str, fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    assert fold in folding().variants
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    before = check(call, model, before)
    check(call, model)
    with torch.no_grad() if name.startswith("copy_") else torch.enable_grad():
        WRITES[name](model)
    check(call, model, None if "load_state_dict" in name or name in ("numpy", "to(dtype) and back") else before)


def test_every_fused_optimiser_is_there() -> None:
    assert {kind.__name__ for kind in FUSED} >= {"SGD", "Adam", "AdamW", "Adagrad"}


def fused_step(weight: nn.Parameter, entry: int) -> None:
    """Moves one entry, and bumps no version."""
    weight.grad = torch.zeros_like(weight)
    weight.grad.view(-1)[entry] = 1.0
    torch.optim.SGD([weight], lr=20.0, fused=True).step()


def numpy_entry(weight: nn.Parameter, entry: int) -> None:
    weight.detach().numpy().reshape(-1)[entry] += 50.0


@pytest.mark.parametrize("fold", KEPT)
@pytest.mark.parametrize("write", [fused_step, numpy_entry])
def test_single_entries(write: Callable[[nn.Parameter, int], None], fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    for entry in (0, 100, 255):
        write(model.up.weight, entry)
        before = check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_ema_swap(fold: str) -> None:
    model, average = net(0), net(1)
    call = compiled(model, fold)
    before = check(call, model)
    for _ in range(3):
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            p.data, q.data = q.data, p.data
        before = check(call, model, before)
    for p, q in zip(model.parameters(), average.parameters(), strict=True):
        kept = p.detach().clone()
        p.data.copy_(q.data)
        q.data.copy_(kept)
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_peft_merge_and_unmerge(fold: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "down"], r=2, lora_alpha=8, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(net(), config).double().eval()
    call = compiled(model, fold)
    start = check(call, model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(3.0)
    before = check(call, model, start)
    model.merge_adapter()
    check(call, model)
    with torch.no_grad():
        model.base_model.model.up.base_layer.weight.mul_(1.5)
    before = check(call, model, before)
    model.unmerge_adapter()
    check(call, model)


@pytest.mark.parametrize("fold", KEPT)
def test_requires_grad_flips(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    before = check(call, model)
    model.requires_grad_(False)
    before = check(call, model)
    model.up.weight.data.mul_(2.0)
    before = check(call, model, before)
    model.requires_grad_(True)
    model.up.weight.data.mul_(2.0)
    check(call, model, before)


@pytest.mark.parametrize("fold", KEPT)
def test_training_and_evaluation_alternate(fold: str) -> None:
    model, reference = net(), net()
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True})
    optimisers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=True) for m in (model, reference)]
    before = None
    for _ in range(4):
        for m, forward, optimiser in ((model, call, optimisers[0]), (reference, reference, optimisers[1])):
            m.train()
            optimiser.zero_grad()
            forward(X).square().sum().backward()
            optimiser.step()
            m.eval()
        with torch.no_grad():
            expected, actual = reference(X), call(X)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-9)
        assert before is None or (expected - before).abs().max() > 1e-3
        before = expected


@pytest.mark.parametrize("fold", KEPT)
def test_parameters_made_under_inference_mode(fold: str) -> None:
    """They have no version, so nothing is believed of them."""
    with torch.inference_mode():
        model = net()
        call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": fold, "strict": True})
        before = model(X)
        assert torch.allclose(call(X), before, rtol=0, atol=1e-12)
        model.up.weight.view(-1)[5] += 20.0
        after = model(X)
        assert torch.allclose(call(X), after, rtol=0, atol=1e-12)
    assert (after - before).abs().max() > 1e-3


def test_swapping_tensors_is_still_possible() -> None:
    """A weak reference to a parameter would forbid it."""
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    with torch.no_grad():
        torch.utils.swap_tensors(model.up.weight, nn.Parameter(torch.randn_like(model.up.weight)))
    check(call, model, before)


def test_a_compiled_optimiser_step_is_not_broken_by_the_hook() -> None:
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    give_gradients(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.compile(optimiser.step)()
    check(call, model, before)
