"""A compiled module in Lightning's `Trainer`. Needs `lightning`, no downloads."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import normfx


class Classifier(lightning.LightningModule):
    """Tells sequences by their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(64), enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(8, 64), nn.Linear(64, 2)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, label = batch
        return nn.functional.cross_entropy(self.head(self.encoder(self.embed(x)).mean(1)), label)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: tuple[Tensor, Tensor], index: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 2, (64,), generator=generator) for _ in range(8)]
    return [(torch.randn(64, 32, 8, generator=generator) + label.view(-1, 1, 1), label) for label in labels]


def fit(compiled: bool) -> list[float]:
    """Trains for one epoch of 8 batches and returns the loss of each."""
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    # the whole module: Lightning calls the compiled training_step
    trainer.fit(torch.compile(module, backend="normfx") if compiled else module, DataLoader(batches(), batch_size=None))
    return module.losses


def main() -> None:
    eager, compiled = fit(compiled=False), fit(compiled=True)
    counts = normfx.compiled_report().counts
    print(f"{counts['to_rms_norm']} of {counts['layer_norm']} LayerNorms became RMSNorms")
    print(f"loss {compiled[0]:.4f} at the first step, {compiled[-1]:.4f} after {len(compiled)}")
    difference = max(abs(a - b) for a, b in zip(eager, compiled, strict=True))
    print(f"largest difference of the losses from eager: {difference:.1e}")


if __name__ == "__main__":
    main()
