"""Compile a small GPT-2 with normfx and print what happened to its norms. Needs `transformers`, no downloads."""

import torch
from transformers import GPT2Config, GPT2Model

import normfx


def main() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=64, n_head=4, use_cache=False)).eval()
    ids = torch.randint(0, 100, (2, 16))
    with torch.no_grad():
        print(normfx.explain(model)(ids))
        compiled = torch.compile(model, backend="normfx")
        difference = compiled(ids).last_hidden_state - model(ids).last_hidden_state
    print(f"largest difference from eager: {difference.abs().max().item():.1e}")


if __name__ == "__main__":
    main()
