"""Tiny random-weight models of real classes, with what normfx is expected to do to them in eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
VISION: dict[str, Any] = dict(SIZES, image_size=32, patch_size=8)
TEXT: dict[str, Any] = dict(SIZES, vocab_size=100, max_position_embeddings=32)
NO_SPECIAL: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)


class Call(nn.Module):
    """A library model as a function of its inputs to the outputs named: logits, last_hidden_state, pooler_output…"""

    def __init__(self, model: nn.Module, output: str, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.output, self.kwargs = model, output, kwargs

    def forward(self, *inputs: Tensor) -> Any:
        out = self.model(*inputs, **self.kwargs)
        return getattr(out, self.output) if self.output else out


PROMOTED = {"llama", "gemma2", "t5", "opt", "falcon", "phi", "gptj", "gpt_neox parallel", "gpt_neox serial", "bloom"}


@dataclass(frozen=True)
class Case:
    """kinds: LayerNorms and RMSNorms in the graph; to_rms, folded: how many become RMSNorm, lose γ and β to readers."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    layer_norms: int
    rms_norms: int
    to_rms: int
    folded: int
    centrings: int = 0
    codes: frozenset[str] = frozenset()

    @property
    def promoted(self) -> bool:
        """Whether the model asks for float32 by name: norms, softmax or rotary tables."""
        return self.name in PROMOTED

    def make(self) -> nn.Module:
        """The model in eval, with norms, biases and scales away from ones and zeros so that a wrong fold shows. The
        test is skipped where the package is not installed: timm and torchvision exist for the newest torch only."""
        pytest.importorskip(self.package)
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim <= 1:
                    p.add_(0.3 * torch.randn_like(p))
        return model

    def batches(self) -> list[tuple[Tensor, ...]]:
        """Three, so that errors are compared over many outputs."""
        generator = torch.Generator().manual_seed(7)
        return [
            tuple(
                torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.roll(i, -1)
                for x in self.inputs()
            )
            for i in range(3)
        ]


def _ids(*shape: int) -> Tensor:
    return torch.randint(1, 100, shape or (2, 12), generator=torch.Generator().manual_seed(0))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text() -> tuple[Tensor, ...]:
    return (_ids(),)


def _image() -> tuple[Tensor, ...]:
    return (_floats(2, 3, 32, 32),)


def _hf(
    model: str, config: str, output: str, init: dict[str, Any] | None = None, **sizes: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        built = getattr(transformers, model)(getattr(transformers, config)(**sizes), **(init or {}))
        kwargs = {"use_cache": False} if output == "logits" or "Seq2" in model else {}
        return Call(built, output, **kwargs)

    return build


def _causal(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    return _hf(model, config, "logits", **{**TEXT, **NO_SPECIAL, **sizes})


def _gpt2(**sizes: Any) -> Callable[[], nn.Module]:
    gpt2 = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=32, **NO_SPECIAL)
    return _hf("GPT2LMHeadModel", "GPT2Config", "logits", **{**gpt2, **sizes})


def _whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=100, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=16,
        max_target_positions=16, decoder_start_token_id=0, **NO_SPECIAL,
    )  # fmt: skip

    class Whisper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.WhisperForConditionalGeneration(config)

        def forward(self, mel: Tensor, ids: Tensor) -> Tensor:
            return self.model(input_features=mel, decoder_input_ids=ids, use_cache=False).logits

    return Whisper()


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )

    class T5(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.T5ForConditionalGeneration(config)

        def forward(self, ids: Tensor, decoder_ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits

    return T5()


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=7
    )
    nn.init.normal_(vit.heads.head.weight)
    return vit


def _timm_vit(**kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7, **kwargs)

    return build


def _timm_cait() -> nn.Module:
    from timm.models.cait import Cait

    return Cait(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7)


def _timm_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=7)


def _encoder(norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)


CASES = (
    Case("gpt2", "transformers", _gpt2(attn_implementation="sdpa"), _text, 5, 0, 5, 5, 0, frozenset({"broadcast"})),
    Case(
        "gpt2 eager attention", "transformers", _gpt2(attn_implementation="eager"), _text, 5, 0, 5, 5, 0,
        frozenset({"broadcast"}),
    ),
    Case("gpt_neox parallel", "transformers", _causal("GPTNeoXForCausalLM", "GPTNeoXConfig"), _text, 5, 0, 5, 5),
    Case(
        "gpt_neox serial", "transformers",
        _causal("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=False), _text, 5, 0, 5, 5,
    ),
    Case(
        "opt", "transformers",
        _causal("OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32), _text, 5, 0, 5, 5,
    ),
    Case(
        "vit", "transformers",
        _hf("ViTModel", "ViTConfig", "last_hidden_state", {"add_pooling_layer": False}, **VISION),
        _image, 5, 0, 5, 4, codes=frozenset({"returned"}),
    ),
    Case(
        "deit", "transformers",
        _hf("DeiTModel", "DeiTConfig", "last_hidden_state", {"add_pooling_layer": False}, **VISION),
        _image, 5, 0, 5, 4, codes=frozenset({"returned"}),
    ),
    Case(
        "dinov2", "transformers", _hf("Dinov2Model", "Dinov2Config", "last_hidden_state", **VISION),
        _image, 5, 0, 5, 4, codes=frozenset({"returned"}),
    ),
    Case("timm vit", "timm", _timm_vit(), _image, 5, 0, 5, 5),
    Case("timm vit layer scale", "timm", _timm_vit(init_values=0.1), _image, 5, 0, 5, 5),
    Case("torchvision vit", "torchvision", _torchvision_vit, _image, 5, 0, 5, 5),
    Case(
        "encoder", "torch", _encoder, lambda: (_floats(2, 12, 32),), 5, 0, 5, 4, 1, frozenset({"returned"}),
    ),
    Case(
        "clip pooled", "transformers", _hf("CLIPVisionModel", "CLIPVisionConfig", "pooler_output", **VISION),
        _image, 6, 0, 6, 4, 1, frozenset({"reader_not_linear", "returned", "broadcast"}),
    ),
    Case(
        "clip hidden", "transformers", _hf("CLIPVisionModel", "CLIPVisionConfig", "last_hidden_state", **VISION),
        _image, 5, 0, 1, 4, 0, frozenset({"observed", "uncentred_input", "reader_not_linear", "broadcast"}),
    ),
    Case(
        "bloom", "transformers",
        _causal("BloomForCausalLM", "BloomConfig", n_layer=2, n_head=4), _text, 6, 0, 6, 5, 1,
        frozenset({"reader_not_linear"}),
    ),
    Case(
        "whisper", "transformers", _whisper, lambda: (_floats(2, 8, 32), _ids(2, 6)), 12, 0, 12, 12, 1,
        frozenset({"broadcast"}),
    ),
    Case(
        "bert post-norm", "transformers",
        _hf("BertModel", "BertConfig", "last_hidden_state", {"add_pooling_layer": False}, **TEXT), _text, 5, 0, 1, 0, 0,
        frozenset({"uncentred_input", "reader_not_linear", "returned", "broadcast"}),
    ),
    Case("llama", "transformers", _causal("LlamaForCausalLM", "LlamaConfig"), _text, 0, 5, 0, 5),
    Case(
        "gemma2", "transformers",
        _causal("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=8), _text, 0, 9, 0, 5, 0,
        frozenset({"reader_not_linear"}),
    ),
    Case("t5", "transformers", _t5, lambda: (_ids(), _ids(2, 6)), 0, 12, 0, 12),
    Case(
        "gptj", "transformers",
        _causal("GPTJForCausalLM", "GPTJConfig", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32),
        _text, 3, 0, 3, 3,
    ),
    Case("falcon", "transformers", _causal("FalconForCausalLM", "FalconConfig"), _text, 3, 0, 3, 3),
    Case("phi", "transformers", _causal("PhiForCausalLM", "PhiConfig"), _text, 3, 0, 3, 3),
    Case("cait", "timm", _timm_cait, _image, 9, 0, 9, 9),
    Case("mixer", "timm", _timm_mixer, _image, 5, 0, 5, 3, 2, frozenset({"reader_not_linear"})),
)  # fmt: skip


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
