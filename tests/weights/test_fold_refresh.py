"""What a changed parameter costs: no compilation, no other fold, no other address; and what gradients see."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folding import KEPT, X, check, compiled, folding, net
from paths import SUPPORT
from torch import nn
from writes import WRITES

from normfx.weights import store


@pytest.mark.parametrize("fold", KEPT)
def test_a_value_change_never_recompiles(fold: str) -> None:
    model = net()
    call = compiled(model, fold)
    check(call, model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ("p.data = t", "p.data.add_", "load_state_dict(assign=True)", "in place under no_grad"):
        WRITES[name](model)
        check(call, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_only_what_depends_on_a_write_is_computed_again() -> None:
    model = net()
    call = compiled(model, "cached")
    check(call, model)
    first = folding().refreshes
    check(call, model)
    assert folding().refreshes == first
    model.enter.bias.data.add_(1.0)  # P b, alone
    check(call, model)
    assert folding().refreshes == first + 1
    model.head.weight.data.mul_(2.0)  # W·γ, and c + Wβ
    check(call, model)
    assert folding().refreshes == first + 3


def replace_one(model: nn.Module) -> None:
    model.up.weight.data = torch.randn_like(model.up.weight)


@pytest.mark.parametrize("write", [replace_one, WRITES["p.data.add_"], WRITES["parameter replaced"]])
def test_values_stay_at_their_address(write: Callable[[nn.Module], object]) -> None:
    """CUDA graphs replay on fixed addresses. (A model whose parameters are all replaced at once counts as deleted.)"""
    model = net()
    call = compiled(model, "cached")
    before = check(call, model)
    gc.collect()  # of entries of earlier tests
    entries = sorted(entry.value.data_ptr() for entry in store.STORE.entries())
    write(model)
    check(call, model, before)
    gc.collect()
    assert sorted(entry.value.data_ptr() for entry in store.STORE.entries()) == entries


def test_live_where_gradients_are_needed() -> None:
    """Frozen weights of a training graph are kept, trained ones are live."""
    model = net()
    model.up.weight.requires_grad_(False)
    model.norm1.requires_grad_(False)
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"strict": True})
    for _ in range(2):
        model.zero_grad()
        out = call(X)
        out.sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(X).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert torch.allclose(grads[name], p.grad, rtol=0, atol=1e-12)
        model.up.weight.data.mul_(1.5)


def test_backward_sees_the_weights_of_its_forward() -> None:
    """A kept value that a backward pass still needs is not overwritten."""
    model = net()
    model.up.requires_grad_(False)
    model.norm1.requires_grad_(False)
    call = torch.compile(model, backend="normfx", fullgraph=True, options={"fold": "cached", "strict": True})
    losses = []
    for run in (model, call):
        x = X.clone().requires_grad_()
        out = run(x)
        kept = model.up.weight.data
        model.up.weight.data = kept * 2  # the old tensor stays what it was: eager's backward still has it
        run(X)
        out.sum().backward()
        model.up.weight.data = kept
        losses.append(x.grad)
    assert torch.allclose(*losses, rtol=0, atol=1e-12)


STARTS = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
from folding import X, net

call = torch.compile(net(), backend={backend!r}, fullgraph=True)
with torch.no_grad():
    call(X)
print(json.dumps([counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "normfx"])
def test_a_second_process_starts_warm(backend: str, tmp_path: Path) -> None:
    """Inductor's and AOTAutograd's caches hit with normfx as they do without."""
    code = STARTS.format(tests=str(SUPPORT), backend=backend)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    starts = [
        json.loads(
            subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
        )
        for _ in range(2)
    ]
    assert starts == [[0, 0], [1, 1]]
