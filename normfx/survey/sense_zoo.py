"""Models of `transformers` that see, hear, or read and see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normfx.survey.family import Build, Call, Family, both, floats, ids, image
from normfx.survey.transformers_models import DECODES, SPECIAL, TEXT, WIDTHS, build, hearing, seeing

HEADS: dict[str, Any] = dict(WIDTHS, num_labels=7)
STAGES: dict[str, Any] = dict(embed_dim=16, num_heads=[1, 2, 4, 8], num_labels=7)
WAVES: dict[str, Any] = dict(
    conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)  # fmt: skip


def _pair(model: str, name: str) -> Build:
    """A tower for images, a tower for text, and the logits between their outputs."""

    def make() -> nn.Module:
        import transformers  # an extra: seconds to import

        text = dict(TEXT, **WIDTHS, projection_size=32)
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=dict(WIDTHS), projection_dim=16)
        return Call(getattr(transformers, model)(config), ("input_ids", "pixel_values"), "logits_per_image", {})

    return make


VISION = (
    seeing("vit", "ViTForImageClassification", "ViTConfig", image(), **HEADS),
    seeing("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", image(), **HEADS),
    seeing(
        "beit", "BeitForImageClassification", "BeitConfig", image(), use_relative_position_bias=True,
        use_absolute_position_embeddings=False, **HEADS,
    ),
    seeing("dinov2", "Dinov2Model", "Dinov2Config", image(), output="pooler_output", **HEADS),
    seeing("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", image(), output="pooler_output", **HEADS),
    seeing("swin", "SwinForImageClassification", "SwinConfig", image(), **STAGES),
    seeing(
        "swinv2", "Swinv2ForImageClassification", "Swinv2Config", image(256), image_size=256, window_size=8, **STAGES
    ),
    seeing("convnext", "ConvNextForImageClassification", "ConvNextConfig", image(), hidden_sizes=[16, 32, 64, 128]),
    seeing(
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", image(), hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=32,
    ),
    seeing(
        "pvt-v2", "PvtV2ForImageClassification", "PvtV2Config", image(), hidden_sizes=[16, 32, 64, 128],
        num_attention_heads=[1, 2, 4, 8],
    ),
    seeing(
        "mobilevit", "MobileViTForImageClassification", "MobileViTConfig", image(256), hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
    ),
    seeing(
        "dpt", "DPTForDepthEstimation", "DPTConfig", image(), output="predicted_depth", image_size=224,
        neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16, **HEADS,
    ),
    seeing("yolos", "YolosForObjectDetection", "YolosConfig", image(), image_size=[224, 224], **HEADS),
    seeing(
        "videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", floats(1, 16, 3, 64, 64), image_size=64, **HEADS
    ),
    seeing("hiera", "HieraForImageClassification", "HieraConfig", image(), **STAGES),
    seeing(
        "sam-encoder", "SamVisionModel", "SamVisionConfig", image(256), output="last_hidden_state", image_size=256,
        hidden_size=32, num_attention_heads=4, mlp_dim=64, output_channels=16, global_attn_indexes=[2, 5, 8, 11],
        window_size=7,
    ),
)  # fmt: skip

PAIRS = (
    Family("clip", "transformers", _pair("CLIPModel", "CLIP"), both(ids(2, 16), image())),
    Family("siglip", "transformers", _pair("SiglipModel", "Siglip"), both(ids(2, 64), image())),
)

SPEECH = (
    hearing("wav2vec2-base", "Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES),
    hearing(
        "wav2vec2-large-lv60", "Wav2Vec2ForCTC", "Wav2Vec2Config", "12 of 24 layers", do_stable_layer_norm=True,
        feat_extract_norm="layer", conv_bias=True, **WAVES,
    ),
    hearing("wavlm", "WavLMForCTC", "WavLMConfig", **WAVES),
    hearing("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", "12 of 24 layers", **WAVES),
    Family(
        "whisper", "transformers",
        build(
            "WhisperForConditionalGeneration", "WhisperConfig", ("input_features", "decoder_input_ids"), "logits",
            DECODES, **{
                **TEXT, "d_model": 32, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 4,
                "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
                "max_source_positions": 50, "decoder_start_token_id": 0,
            },
        ),
        both(floats(1, 16, 100), ids(1, 9)),
    ),
    Family(
        "audio-spectrogram-transformer", "transformers",
        build("ASTForAudioClassification", "ASTConfig", ("input_values",), "logits", max_length=128, **HEADS),
        floats(1, 128, 128),
    ),
    Family(
        "speech-to-text", "transformers",
        build(
            "Speech2TextForConditionalGeneration", "Speech2TextConfig", ("input_features", "decoder_input_ids"),
            "logits", DECODES, **{
                **TEXT, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "input_feat_per_channel": 16, "conv_channels": 32,
                "decoder_start_token_id": 0,
            },
        ),
        both(floats(1, 100, 16), ids(1, 9)),
    ),
    Family(
        "moonshine", "transformers",
        build(
            "MoonshineForConditionalGeneration", "MoonshineConfig", ("input_values", "decoder_input_ids"), "logits",
            DECODES, **{
                **TEXT, "hidden_size": 32, "intermediate_size": 64, "encoder_num_attention_heads": 4,
                "decoder_num_attention_heads": 4, "decoder_start_token_id": 0,
            },
        ),
        both(floats(1, 16000), ids(1, 9)),
    ),
)  # fmt: skip

_PLAYED = ("states", "actions", "rewards", "returns_to_go", "timesteps", "attention_mask")

OTHERS = (
    Family(
        "detr", "transformers",
        build(
            "DetrForObjectDetection", "DetrConfig", ("pixel_values",), "logits", d_model=32,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            num_queries=10,
        ),
        image(128),
    ),
    Family(
        "vilt", "transformers",
        build(
            "ViltForQuestionAnswering", "ViltConfig", ("input_ids", "pixel_values"), "logits",
            **{**TEXT, **HEADS, "image_size": 128},
        ),
        both(ids(2, 16), image(128)),
    ),
    Family(
        "decision-transformer", "transformers",
        build(
            "DecisionTransformerModel", "DecisionTransformerConfig", _PLAYED, "action_preds", hidden_size=32, n_head=4,
            **SPECIAL,
        ),
        both(
            floats(1, 6, 17), floats(1, 6, 4), floats(1, 6, 1), floats(1, 6, 1), ids(1, 6),
            lambda: (torch.ones(1, 6, dtype=torch.long),),
        ),
    ),
)  # fmt: skip

FAMILIES = (*VISION, *PAIRS, *SPEECH, *OTHERS)
