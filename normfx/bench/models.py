"""The models that `normfx bench` knows by name, made with random weights, and how others are found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfx.errors import NormfxError, OptionError

Factory = Callable[[int], tuple[nn.Module, tuple[Tensor, ...]]]
"""Batch size → a module that maps tensors to one tensor, and its inputs."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHAIN = "layer_norm_chain"
CHAIN_PARAMETERS = 300


class Logits(nn.Module):
    """A model of transformers as a function of tensors to logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


@dataclass(frozen=True)
class _Transformer:
    """A class of transformers, the fields of its config, and its inputs by name, each a function of the batch size."""

    architecture: str
    config: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, Callable[[int], Tensor]]

    def __call__(self, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        import transformers  # an extra: seconds to import

        config = getattr(transformers, self.config)(**self.fields, attn_implementation="sdpa")
        model = Logits(getattr(transformers, self.architecture)(config), tuple(self.inputs))
        return perturbed(model), tuple(draw(batch) for draw in self.inputs.values())


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval, norms and biases moved off the ones and zeros of a fresh one: a wrong fold would not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def _tokens(vocabulary: int, count: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(vocabulary, (batch, count))


def _vit(width: int, heads: int) -> _Transformer:
    fields = dict(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=224, patch_size=16, num_labels=1000,
    )  # fmt: skip
    return _Transformer("ViTForImageClassification", "ViTConfig", fields, {"pixel_values": _floats(3, 224, 224)})


def _chain(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Many parameters and next to no arithmetic: what is left of a call is what surrounds its kernels."""
    width = 8
    pairs = [m for _ in range(CHAIN_PARAMETERS // 4) for m in (nn.LayerNorm(width), nn.Linear(width, width))]
    return perturbed(nn.Sequential(*pairs)), (torch.randn(batch, width),)


MODELS: dict[str, Factory] = {
    "vit_tiny": _vit(192, 3),
    "vit_small": _vit(384, 6),
    "gpt2_small": _Transformer(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_layer=12, n_embd=768, n_head=12, use_cache=False),
        {"input_ids": _tokens(50257, 128)},
    ),
    "pythia_70m": _Transformer(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        dict(
            hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
            use_cache=False,
        ),
        {"input_ids": _tokens(50304, 128)},
    ),
    "whisper_tiny": _Transformer(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(
            d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6,
            encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80, vocab_size=51865, use_cache=False,
        ),
        {"input_features": _floats(80, 3000), "decoder_input_ids": _tokens(51865, 32)},
    ),
    CHAIN: _chain,
}  # fmt: skip


def factory(name: str) -> Factory:
    """A model by name, or the callable that `module:factory` names.

    Raises OptionError for an unknown name, NormfxError when transformers is needed and missing.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        if (folder := str(Path.cwd())) not in sys.path:  # a script finds the folder it lies in, not that of the call
            sys.path.insert(0, folder)
        try:
            found: Factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise OptionError(f"normfx: cannot import the model {name!r}: {error}") from error
        return found
    if name not in MODELS:
        raise OptionError.unknown("model", name, (*MODELS, "module:factory"), "--models")
    if name != CHAIN and importlib.util.find_spec("transformers") is None:
        raise NormfxError(f"normfx: the model {name!r} needs transformers: pip install 'normfx[bench]'")
    return MODELS[name]


def make(name: str, dtype: str, batch: int, device: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and its inputs, the same at every call; floating-point inputs follow the dtype."""
    torch.manual_seed(0)
    module, inputs = factory(name)(batch)
    kind = DTYPES[dtype]
    moved = (x.to(device, kind if x.is_floating_point() else x.dtype) for x in inputs)
    return module.to(device, kind), tuple(moved)
