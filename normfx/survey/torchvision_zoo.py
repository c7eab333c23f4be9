"""Vision models of `torchvision`."""

from __future__ import annotations

from typing import Any

from torch import nn

from normfx.survey.family import Family, Inputs, image


def _named(name: str, path: str, inputs: Inputs | None = None, **fields: Any) -> Family:
    """What a class or function of torchvision.models makes."""

    def make() -> nn.Module:
        import torchvision  # an extra

        maker: Any = torchvision.models
        for part in path.split("."):
            maker = getattr(maker, part)
        made: nn.Module = maker(**fields)
        return made

    return Family(f"torchvision-{name}", "torchvision", make, inputs or image())


FAMILIES = (
    _named(
        "vit",
        "VisionTransformer",
        image_size=224,
        patch_size=16,
        num_layers=12,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=7,
    ),
    _named("swin", "swin_t"),
    _named("swinv2", "swin_v2_t", image(256)),
    _named("convnext", "convnext_tiny"),
    _named("maxvit", "maxvit_t"),
)
