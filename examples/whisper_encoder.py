"""The encoder of a small Whisper with random weights on a made-up sound. Needs `transformers`, no downloads."""

import math

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperModel

import normfx

FRAMES = 100


def chirp() -> Tensor:
    """Returns the log-mel features (1, 80, FRAMES) of a tone that rises through all 80 bands."""
    bands, frames = torch.arange(80.0).unsqueeze(1), torch.arange(float(FRAMES))
    distance = bands - 80 * frames / FRAMES
    return (torch.exp(-(distance**2) / 8).clamp(min=1e-4).log10() / math.log10(1e4) + 0.5).unsqueeze(0)


def main() -> None:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=128, max_source_positions=FRAMES // 2, vocab_size=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    encoder = WhisperModel(config).get_encoder().eval()
    features = chirp()
    compiled = torch.compile(encoder, backend="normfx")
    with torch.inference_mode():
        eager, states = encoder(features).last_hidden_state, compiled(features).last_hidden_state
    counts = normfx.compiled_report().counts
    print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms")
    print(f"{tuple(states.shape)}, largest difference from eager: {(states - eager).abs().max():.1e}")


if __name__ == "__main__":
    main()
