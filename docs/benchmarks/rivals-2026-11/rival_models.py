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


def _text(model: Any, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return perturbed(Logits(model, ("input_ids",))), (torch.randint(VOCABULARY, (batch, 256)),)
