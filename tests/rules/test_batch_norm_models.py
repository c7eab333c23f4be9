"""fold_batch_norm on classes of timm: how many BatchNorms are folded, and that nothing but the graph changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from equivalence import LOW_PRECISION, EagerBackend, assert_same_results, outputs_and_grads
from torch import Tensor, nn

from normfx.survey.family import calibrated

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[int, int, int]] = {
    "resnet18": (96, 20, 20),
    "regnetx_002": (96, 44, 44),
    "levit_128s": (224, 52, 50),
    "efficientnet_b0": (96, 49, 49),
    "fastvit_t8": (96, 70, 46),
    "repvgg_a0": (96, 61, 44),
}
"""Size of an image, BatchNorms in the graph, those folded."""


def ready(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """Random weights; γ and β random, one β large; statistics near those of the inputs, moved by a part of them."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=7).eval()
    x = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.3, 1.5)
            norm.bias.normal_()
            norm.bias[0] = 8.0
        calibrated(model, (x,))
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
            norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.7)
    return model, x[:2]


def compiled(model: nn.Module, **options: Any) -> tuple[Any, EagerBackend]:
    torch._dynamo.reset()
    backend = EagerBackend({"fold": "cached", **options})
    return torch.compile(model, backend=backend, fullgraph=True), backend


@pytest.mark.parametrize("name", MODELS)
def test_folded_and_the_same(name: str) -> None:
    """The counts of docs/rules.md; float64; and the next call after the statistics moved."""
    size, found, folded = MODELS[name]
    model, x = ready(name, size)
    model, x = model.double(), x.double()
    call, backend = compiled(model)
    with torch.no_grad():
        assert _error(call(x), model(x)) <= 1e-12
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.add_(0.2)
                module.running_var.data.mul_(1.1)
        assert _error(call(x), model(x)) <= 1e-12
    sites = [site for site in backend.graphs[0].sites if site.kind == "BatchNorm"]
    assert (len(sites), sum(site.rules == ("fold_batch_norm",) for site in sites)) == (found, folded)


def test_gradients() -> None:
    model, x = ready("resnet18", 96)
    model, x = model.double(), x.double()
    call, _ = compiled(model, fold="live")
    want, want_grads = outputs_and_grads(model, model, (x,))
    got, got_grads = outputs_and_grads(call, model, (x,))
    assert_same_results(want, want_grads, got, got_grads)


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0"])
def test_float32_error(name: str) -> None:
    """Against float64, relative to eager's own."""
    model, x = ready(name, MODELS[name][0])
    call, _ = compiled(model)
    with torch.no_grad():
        true = copy.deepcopy(model).double()(x.double())
        own, eager = ((out.double() - true).norm().item() for out in (call(x), model(x)))
    assert own <= LOW_PRECISION[torch.float32] * eager


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
