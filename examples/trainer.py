"""A model compiled with normfx in `transformers.Trainer`. Needs `transformers` and `accelerate`, no downloads."""

import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import normfx


class Stripes(Dataset[dict[str, Tensor]]):
    """Noisy images with horizontal (0) or vertical (1) stripes."""

    def __init__(self) -> None:
        noise = 0.3 * torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        stripes = (torch.arange(16) % 2).float().expand(3, 16, 16)
        self.labels = torch.arange(128) % 2
        self.images = noise + torch.stack([stripes if label else stripes.mT for label in self.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def train(compiled: bool) -> list[float]:
    """Trains for 8 steps and returns the loss of each."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=2, problem_type="single_label_classification",  # else step 1 writes it, and step 2 compiles again
    )  # fmt: skip
    model = ViTForImageClassification(config)
    if compiled:
        # not by TrainingArguments(torch_compile_backend=...), which takes only the names that accelerate knows
        model.compile(backend="normfx")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=8, per_device_train_batch_size=64, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, log_level="error",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Stripes())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    eager, compiled = train(compiled=False), train(compiled=True)
    counts = normfx.compiled_report().counts
    print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms")
    print(f"loss {compiled[0]:.4f} at the first step, {compiled[-1]:.4f} after {len(compiled)}")
    difference = max(abs(a - b) for a, b in zip(eager, compiled, strict=True))
    print(f"largest difference of the losses from eager: {difference:.1e}")


if __name__ == "__main__":
    main()
