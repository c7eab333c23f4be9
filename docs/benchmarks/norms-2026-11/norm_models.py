"""Models with LayerNorms of uncentred rows, or with BatchNorms: timm and torchvision, random weights.

For `normfx bench --models norm_models:swin_t,…` from this folder.
"""

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from normfx.bench.models import perturbed


def swin_t(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(torchvision.models.swin_t(), batch)


def coatnet(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(timm.create_model("coatnet_0_rw_224"), batch)


def coat(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(timm.create_model("coat_lite_mini"), batch)


def convnext(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(timm.create_model("convnext_tiny"), batch)


def normformer(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """ViT-S with a norm in each attention and in each MLP, as NormFormer has them."""
    model = VisionTransformer(embed_dim=384, num_heads=6, scale_attn_norm=True, scale_mlp_norm=True)
    return _image(model, batch)


def resnet50(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(torchvision.models.resnet50(), batch)


def repvgg(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _image(timm.create_model("repvgg_a0"), batch)


def _image(model: nn.Module, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return perturbed(model), (torch.randn(batch, 3, 224, 224),)
