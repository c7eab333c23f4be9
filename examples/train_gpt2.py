"""Train a small GPT-2 from scratch on a text's characters, eagerly and compiled with normfx. Needs `transformers`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import normfx

TEXT = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way – in short, the period was so far like the present
period, that some of its noisiest authorities insisted on its being received, for good or for evil, in the superlative
degree of comparison only."""
CHARACTERS = sorted(set(TEXT))
STEPS, BATCH, LENGTH = 30, 64, 32  # for far fewer rows the weights are not folded: each step has to do it again


def batches() -> list[Tensor]:
    """Draws random excerpts of the text, as indices of characters; the same ones at each call."""
    text = torch.tensor([CHARACTERS.index(c) for c in TEXT])
    starts = torch.randint(0, len(text) - LENGTH, (STEPS, BATCH, 1), generator=torch.Generator().manual_seed(0))
    return list(text[starts + torch.arange(LENGTH)])


def train(compiled: bool) -> list[float]:
    """Trains the model and returns the loss of each step."""
    torch.manual_seed(0)
    # without dropout: eager and compiled models draw different random numbers
    config = GPT2Config(
        vocab_size=len(CHARACTERS), n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, use_cache=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # the parameters stay the model's own
    step = torch.compile(model, backend="normfx") if compiled else model
    losses = []
    for ids in batches():
        logits = step(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    eager, compiled = train(compiled=False), train(compiled=True)
    counts = normfx.compiled_report().counts
    print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms")
    for name, losses in (("eager", eager), ("normfx", compiled)):
        print(f"{name}: loss {losses[0]:.6f} at the first step, {losses[-1]:.6f} after {STEPS} steps")
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in zip(eager, compiled, strict=True)):.1e}")


if __name__ == "__main__":
    main()
