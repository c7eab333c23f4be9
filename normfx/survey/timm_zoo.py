"""Vision models of `timm`."""

from __future__ import annotations

from typing import Any

from torch import nn

from normfx.survey.family import Family, image


def _named(name: str, architecture: str, size: int = 224, built: str = "", **fields: Any) -> Family:
    """The model that timm makes under that name, with other widths."""

    def make() -> nn.Module:
        import timm  # an extra

        made: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=7, **fields)
        return made

    return Family(f"timm-{name}", "timm", make, image(size), built)


def _gmlp() -> nn.Module:
    """timm's names for it fix the depth."""
    from timm.models.mlp_mixer import GatedMlp, MlpMixer, SpatialGatingBlock  # an extra

    made: nn.Module = MlpMixer(
        num_blocks=12, embed_dim=32, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, num_classes=7
    )
    return made


PLAIN: dict[str, Any] = dict(embed_dim=32, num_heads=4)
FOUR: tuple[int, ...] = (16, 32, 64, 128)

FAMILIES = (
    _named("vit", "vit_small_patch16_224", **PLAIN),
    _named("vit-siglip", "vit_base_patch16_siglip_224", **PLAIN),
    _named("dinov2-reg", "vit_small_patch14_reg4_dinov2", 224, img_size=224, **PLAIN),
    _named("deit3", "deit3_small_patch16_224", **PLAIN),
    _named("vit-parallel", "vit_small_patch16_18x2_224", built="9 of 18 layers", depth=9, **PLAIN),
    _named("eva02", "eva02_tiny_patch14_224", **PLAIN),
    _named("cait", "cait_xxs24_224", built="12 of 24 layers", depth=12, **PLAIN),
    _named("beit", "beit_base_patch16_224", **PLAIN),
    _named("xcit", "xcit_nano_12_p16_224", **PLAIN),
    _named("mixer", "mixer_s16_224"),
    Family("timm-gmlp", "timm", _gmlp, image(), "12 of 30 layers"),
    _named("poolformer", "poolformer_s12"),
    _named("caformer", "caformer_s18"),
    _named("convnext", "convnext_tiny", dims=FOUR),
    _named("convnextv2", "convnextv2_tiny", dims=FOUR),
    _named("swin", "swin_tiny_patch4_window7_224", embed_dim=16, num_heads=(1, 2, 4, 8)),
    _named("swinv2", "swinv2_tiny_window8_256", 256, embed_dim=16, num_heads=(1, 2, 4, 8)),
    _named("pvt-v2", "pvt_v2_b0", embed_dims=FOUR, num_heads=(1, 2, 4, 8)),
    _named("maxvit", "maxvit_tiny_tf_224", embed_dim=(32, 32, 64, 64)),
    _named("coatnet", "coatnet_0_rw_224", embed_dim=(32, 32, 64, 64)),
    _named("volo", "volo_d1_224"),
    _named("twins-svt", "twins_svt_small", embed_dims=FOUR, num_heads=(1, 2, 4, 8)),
    _named("davit", "davit_tiny", embed_dims=FOUR, num_heads=(1, 2, 4, 8)),
    _named("mvitv2", "mvitv2_tiny"),
    _named("edgenext", "edgenext_small"),
    _named("hiera", "hiera_tiny_224", embed_dim=16, num_heads=1),
)
