"""fold_batch_norm on classes of timm: how many BatchNorms are folded, and that nothing but the graph changed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from batch_norm_nets import moved
from equivalence import LOW_PRECISION, EagerBackend, outputs_and_grads
from torch import Tensor, nn

from normfx.survey.family import calibrated

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "resnet18": (64, {}, 20, 20),
    "resnetv2_50x1_bit": (64, {}, 0, 0),
}
"""Size of an image, arguments, BatchNorms in the graph, those folded."""


def model_of(name: str, **fields: Any) -> nn.Module:
    """With random weights, and statistics near those of its inputs, with means and outliers."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=7, **fields).eval()
    return model


def ready(name: str, size: int, fields: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = calibrated(_affine_moved(model_of(name, **fields)), (x,))
    return model, x


def _affine_moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.3, 1.5)
                module.bias.normal_()
                module.bias[0] = 8.0
    return model
