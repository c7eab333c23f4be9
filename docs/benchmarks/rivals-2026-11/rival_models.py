"""Models of transformers with random weights, for `normfx bench --models rival_models:gpt2,…` from this folder."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from normfx.bench.models import Logits, perturbed

VOCABULARY = 8000


def gpt2(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.GPT2Config(n_layer=6, n_embd=384, n_head=6, vocab_size=VOCABULARY, use_cache=False)
    return _text(transformers.GPT2LMHeadModel(config), batch)


def bert(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, vocab_size=VOCABULARY
    )
    return _text(transformers.BertForMaskedLM(config), batch)


def vit(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    model = Logits(transformers.ViTForImageClassification(config), ("pixel_values",))
    return perturbed(model), (torch.randn(batch, 3, 224, 224),)


def neox(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.GPTNeoXConfig(
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return _text(transformers.GPTNeoXForCausalLM(config), batch, 128)


def llama(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1376,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return _text(transformers.LlamaForCausalLM(config), batch, 128)


def esm(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        pad_token_id=1,
        mask_token_id=32,
        position_embedding_type="rotary",
        token_dropout=False,
    )
    model = transformers.EsmForMaskedLM(config)
    return perturbed(Logits(model, ("input_ids",))), (torch.randint(4, 24, (batch, 256)),)


def _text(model: Any, batch: int, tokens: int = 256) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return perturbed(Logits(model, ("input_ids",))), (torch.randint(VOCABULARY, (batch, tokens)),)


def opt(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.OPTConfig(
        hidden_size=512,
        word_embed_proj_dim=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        ffn_dim=2048,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return _text(transformers.OPTForCausalLM(config), batch, 192)


def dinov2(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=8, num_attention_heads=6, image_size=224, num_labels=1000
    )
    model = Logits(transformers.Dinov2ForImageClassification(config), ("pixel_values",))
    return perturbed(model), (torch.randn(batch, 3, 224, 224),)


def qwen3(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.Qwen3Config(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return _text(transformers.Qwen3ForCausalLM(config), batch, 160)
