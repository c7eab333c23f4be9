"""Fine-tune a small GPT-2 by LoRA, compiled with normfx, and merge the adapters. Needs `transformers` and `peft`."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import normfx

VOCABULARY, STEPS = 32, 10
COUNTING = (torch.arange(32) + torch.arange(32).unsqueeze(1)) % VOCABULARY  # each row counts upwards


def adapted() -> PeftModel:
    """Builds a small GPT-2 with random weights and adapters; only the adapters are trained."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=1, n_head=4, use_cache=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(config), lora)


def finetune(model: PeftModel, compiled: bool) -> list[float]:
    """Trains the adapters and returns the loss of each step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    forward = torch.compile(model, backend="normfx") if compiled else model
    losses = []
    for _ in range(STEPS):
        logits: Tensor = forward(input_ids=COUNTING).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), COUNTING[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    model, eager_model = adapted(), adapted()
    losses, eager_losses = finetune(model, compiled=True), finetune(eager_model, compiled=False)
    print(f"loss {losses[0]:.6f} at the first step, {losses[-1]:.6f} after {STEPS} steps")
    difference = max(abs(a - b) for a, b in zip(losses, eager_losses, strict=True))
    print(f"largest difference of the losses from eager: {difference:.1e}")

    counts = normfx.compiled_report().counts
    print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms in training")

    model.eval()
    forward = torch.compile(model, backend="normfx")
    with torch.no_grad():
        before = forward(input_ids=COUNTING).logits
        model.merge_adapter()  # writes W + BA into W: folded weights are computed again in the next call
        after = forward(input_ids=COUNTING).logits
        print(f"merged in place, largest difference from eager: {(after - model(COUNTING).logits).abs().max():.1e}")
        print(f"and from the output before: {(after - before).abs().max():.1e}")
        with model.disable_adapter():  # also takes the adapters out of W
            print(f"the adapters had changed the logits by {(after - model(COUNTING).logits).abs().max():.1e}")

        model.unmerge_adapter()
        merged = model.merge_and_unload()  # a plain GPT-2 without adapters
        difference = torch.compile(merged, backend="normfx")(COUNTING).logits - merged(COUNTING).logits
        print(f"merged and unloaded, largest difference from eager: {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()
