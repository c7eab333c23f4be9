"""Milliseconds of a token where a model decodes one at a time with a static cache, interleaved: a table in Markdown.

All variants decode greedily from one prompt; tokens have to be those of eager.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "inductor, freezing": {"backend": "inductor", "options": {"freezing": True}},
    "normfx": {"backend": "normfx", "options": {"strict": True}},
    "normfx, frozen": {"backend": "normfx", "options": {"strict": True, "fold": "frozen"}},
}

LENGTH, PROMPT = 256, 32


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0))


def llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376, vocab_size=32000
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {"gpt2": gpt2, "llama": llama}


class Decoder:
    """A model and its cache, one token after another."""

    def __init__(self, model: transformers.PreTrainedModel, how: dict[str, Any] | None) -> None:
        self.model = model
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
        self.forward = model.forward if how is None else torch.compile(model.forward, **how)

    def tokens(self, prompt: Tensor, count: int) -> tuple[list[int], list[float]]:
        """The tokens that follow a prompt, and the milliseconds of each but the first."""
        self.cache.reset()
        found, times = [], []
        logits = self.model(prompt, past_key_values=self.cache, position_ids=torch.arange(PROMPT)[None]).logits
        for place in range(PROMPT, PROMPT + count):
            found.append(int(logits[0, -1].argmax()))
            start = time.perf_counter()
            token, position = torch.tensor([[found[-1]]]), torch.tensor([[place]])
            logits = self.forward(token, past_key_values=self.cache, position_ids=position).logits
            times.append(1e3 * (time.perf_counter() - start))
        return found, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=24)
    given = parser.parse_args()
    print("| model | dtype | " + " | ".join(VARIANTS) + " |")
    print("|---" * (2 + len(VARIANTS)) + "|")
    for name in given.models.split(","):
        for dtype in given.dtypes.split(","):
            torch.manual_seed(0)
            model = MODELS[name]().eval().to(getattr(torch, dtype))
            prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))
            torch._dynamo.reset()
            decoders = {variant: Decoder(model, how) for variant, how in VARIANTS.items()}
            times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            same = dict.fromkeys(VARIANTS, True)
            with torch.no_grad():
                for turn in range(given.rounds + 1):
                    wanted: list[int] = []
                    for variant, decoder in decoders.items():
                        tokens, found = decoder.tokens(prompt, given.count)
                        wanted = wanted or tokens
                        same[variant] &= tokens == wanted
                        if turn:
                            times[variant].append(statistics.median(found))
            cells = []
            for variant, found in times.items():
                low, middle, high = statistics.quantiles(found, n=4)
                cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f}){'' if same[variant] else ', other tokens'}")
            print(f"| {name} | {dtype} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
