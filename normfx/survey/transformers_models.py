"""How models of `transformers` are made from their configuration classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from normfx.survey.family import VOCABULARY, Build, Call, Family, Inputs, both, floats, ids

WIDTHS: dict[str, Any] = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
SPECIAL: dict[str, Any] = dict(pad_token_id=0, bos_token_id=0, eos_token_id=0)
TEXT: dict[str, Any] = dict(vocab_size=VOCABULARY, **SPECIAL)
DECODES: dict[str, Any] = dict(use_cache=False)


def build(
    model: str,
    config: str,
    inputs: tuple[str, ...],
    output: str,
    fixed: dict[str, Any] | None = None,
    **fields: Any,
) -> Build:
    """A model class, its configuration class and fields, the names of its inputs and of the output to look at.

    fixed: further arguments of each call
    """

    def make() -> nn.Module:
        import transformers  # an extra: seconds to import

        made = getattr(transformers, model)(getattr(transformers, config)(**fields))
        return Call(made, inputs, output, fixed or {})

    return make


def causal(name: str, model: str, config: str, depth: str = "", **fields: Any) -> Family:
    """A language model that predicts the next token, without its cache: tokens → logits."""
    made = build(model, config, ("input_ids",), "logits", DECODES, **{**TEXT, **fields})
    return Family(name, "transformers", made, ids(), depth)


def masked(name: str, model: str, config: str, depth: str = "", output: str = "logits", **fields: Any) -> Family:
    """An encoder with the head it was trained with: tokens → logits."""
    made = build(model, config, ("input_ids",), output, **{**TEXT, **WIDTHS, **fields})
    return Family(name, "transformers", made, ids(), depth)


def translating(name: str, model: str, config: str, depth: str = "", **fields: Any) -> Family:
    """An encoder and a decoder: tokens and tokens so far → logits."""
    sizes = dict(
        d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        decoder_start_token_id=0,
    )  # fmt: skip
    names = ("input_ids", "decoder_input_ids")
    made = build(model, config, names, "logits", DECODES, **{**TEXT, **sizes, **fields})
    return Family(name, "transformers", made, both(ids(), ids(2, 9)), depth)


def seeing(
    name: str, model: str, config: str, inputs: Inputs, depth: str = "", output: str = "logits", **fields: Any
) -> Family:
    """pixel_values → an output."""
    made = build(model, config, ("pixel_values",), output, **fields)
    return Family(name, "transformers", made, inputs, depth)


def hearing(name: str, model: str, config: str, depth: str = "", output: str = "logits", **fields: Any) -> Family:
    """A waveform of a second → an output."""
    made = build(model, config, ("input_values",), output, **{**TEXT, **WIDTHS, **fields})
    return Family(name, "transformers", made, floats(1, 16000), depth)
