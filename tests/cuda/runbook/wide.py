"""Models for `normfx bench --models wide:…`: layers as wide as a large model's, few enough to be compiled at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfx.bench.models import Logits, perturbed


def gpt2(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two blocks of 4,096 features, 1,024 tokens a sequence, a small vocabulary."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=4096,
        n_head=32,
        vocab_size=4096,
        n_positions=1024,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = Logits(transformers.GPT2LMHeadModel(config), ("input_ids",))
    return perturbed(model), (torch.randint(4096, (batch, 1024)),)
