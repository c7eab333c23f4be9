"""Adapters of peft on all linear layers of a small pre-norm model: what normfx makes of the norms next to them.

Unmerged, merged and in training; outputs and every gradient are compared with eager's in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from equivalence import EagerBackend, outputs_and_grads
from rule_test import moved
from torch import Tensor, nn

from normfx.report import Report

WIDTH = 32
RULES = ("pre_rms_norm", "fold_affine")


@dataclass(frozen=True)
class Adapter:
    """A method of peft. config: of peft, for these linear layers; why: what stays, and the reason"""

    name: str
    config: Callable[[Any, list[str]], Any]
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """The report, and how far outputs and gradients are from eager's, relative to the largest entry of each."""

    report: Report
    difference: float


_ODD = dict(init_weights=False)

ADAPTERS = (
    Adapter("LoRA", lambda p, t: p.LoraConfig(r=4, target_modules=t, init_lora_weights=False)),
    Adapter(
        "DoRA",
        lambda p, t: p.LoraConfig(r=4, target_modules=t, init_lora_weights=False, use_dora=True),
        "peft breaks Dynamo's graph in each layer (`str.startswith` on a module's name): no graph holds a whole stream",
    ),
    Adapter("AdaLoRA", lambda p, t: p.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=t)),
    Adapter(
        "LoHa",
        lambda p, t: p.LoHaConfig(r=4, target_modules=t, **_ODD),
        "in training a random number decides whether the adapter runs, which breaks Dynamo's graph",
    ),
    Adapter(
        "LoKr",
        lambda p, t: p.LoKrConfig(r=4, target_modules=t, **_ODD),
        "in training a random number decides whether the adapter runs, which breaks Dynamo's graph",
    ),
    Adapter("VeRA", lambda p, t: p.VeraConfig(r=8, target_modules=t, **_ODD)),
    Adapter("RandLoRA", lambda p, t: p.RandLoraConfig(r=8, target_modules=t, **_ODD)),
    Adapter(
        "VB-LoRA",
        lambda p, t: p.VBLoRAConfig(r=4, num_vectors=16, vector_length=8, target_modules=t),
        "in training peft asks for values of a parameter, which breaks Dynamo's graph",
    ),
    Adapter(
        "IA³",
        lambda p, t: p.IA3Config(target_modules=t, feedforward_modules=t[-2:], init_ia3_weights=False),
        "its vector multiplies what a feed-forward layer reads: γ and β stay in the norm before one",
    ),
    Adapter("FourierFT", lambda p, t: p.FourierFTConfig(n_frequency=50, target_modules=t, **_ODD)),
    Adapter(
        "WaveFT",
        lambda p, t: p.WaveFTConfig(n_frequency=50, target_modules=t, **_ODD),
        "peft breaks Dynamo's graph in each layer (`nonzero`, a subscript of a type): no graph holds a whole stream",
    ),
    Adapter(
        "SHiRA",
        lambda p, t: p.ShiraConfig(r=4, target_modules=t, **_ODD),
        "peft breaks Dynamo's graph in each layer (`torch.sparse_coo_tensor`): no graph holds a whole stream",
    ),
    Adapter("BOFT", lambda p, t: p.BOFTConfig(boft_block_size=8, target_modules=t, **_ODD)),
    Adapter("HRA", lambda p, t: p.HRAConfig(r=4, target_modules=t, **_ODD)),
    Adapter(
        "OFT",
        lambda p, t: p.OFTConfig(oft_block_size=8, target_modules=t, **_ODD),
        "blocks of features are rotated, each by a matrix of its own, before the linear reads them: γ and β stay",
    ),
    Adapter(
        "MiSS",
        lambda p, t: p.MissConfig(r=4, target_modules=t, **_ODD),
        "what reads the norm adds up blocks of its features: γ and β stay",
    ),
    Adapter(
        "GraLoRA",
        lambda p, t: p.GraloraConfig(r=4, gralora_k=2, target_modules=t, **_ODD),
        "each block of features has a matrix of its own: γ and β stay in what it reads, and what it writes keeps its "
        "mean: P would need entries between the blocks",
    ),
    Adapter(
        "C3A",
        lambda p, t: p.C3AConfig(block_size=8, target_modules=t, **_ODD),
        "Fourier transforms of blocks of features read the norm: γ and β stay. They are in float32 whatever the "
        "model's dtype, which is the difference; in training they are opaque, and what they write keeps its mean",
    ),
    Adapter("LN tuning", lambda p, t: p.LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"])),
)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * WIDTH, image_size=32,
        patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


class Adapted(nn.Module):
    """A model of transformers with adapters, called with images; its last hidden state."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        import peft

        base = _vit()
        names = (name for name, module in base.named_modules() if isinstance(module, nn.Linear))
        layers = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        self.model: Any = peft.get_peft_model(base, adapter.config(peft, layers))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.model.base_model.model(images).last_hidden_state
        return out


def adapted(adapter: Adapter) -> Adapted:
    torch.manual_seed(0)
    model = Adapted(adapter)
    moved(model).double().requires_grad_(True)
    return model


def inference(model: Adapted) -> Outcome:
    """Without gradients, with kept folds."""
    images, backend = _images(), EagerBackend({"fold": "cached"})
    model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        want, got = model(images), torch.compile(model, backend=backend)(images)
    return Outcome(backend.report, _difference(got, want, want.abs().max().item()))


def training(model: Adapted) -> Outcome:
    """Outputs and every gradient."""
    images, backend = _images(), EagerBackend({"fold": "auto"})
    model.train()
    torch._dynamo.reset()
    want, want_grads = outputs_and_grads(model, model, (images,))
    got, got_grads = outputs_and_grads(torch.compile(model, backend=backend), model, (images,))
    differences = [_difference(a, b, b.abs().max().item()) for a, b in zip(got, want, strict=True)]
    largest = max(g.abs().max().item() for g in want_grads.values() if g is not None)
    for name, grad in want_grads.items():
        assert (grad is None) == (got_grads[name] is None), name
        if grad is not None:
            scale = max(grad.abs().max().item(), 1e-3 * largest)
            differences.append(_difference(got_grads[name], grad, scale))
    return Outcome(backend.report, max(differences))


def _difference(got: Any, want: Tensor, scale: float) -> float:
    return (got - want).abs().max().item() / scale


def _images() -> Tensor:
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def codes(report: Report) -> dict[str, list[str]]:
    """Codes of the refusals of each of RULES, each once."""
    found: dict[str, list[str]] = {}
    for rule in RULES:
        refused = [r.code for site in report.sites for r in site.refusals if r.rule == rule]
        if refused:
            found[rule] = list(dict.fromkeys(refused))
    return found


def row(adapter: Adapter) -> str:
    """What becomes of a model with the adapter, as a line of the table."""
    model = adapted(adapter)
    plain, trained = inference(model), training(model)
    worst = max(plain.difference, trained.difference)
    model.eval()
    merged = "–"
    if hasattr(model.model, "merge_adapter"):
        model.model.merge_adapter()
        outcome = inference(model)
        merged, worst = _counts(outcome.report), max(worst, outcome.difference)
    counts = plain.report.counts
    cells = [adapter.name, str(len(plain.report.graphs)), str(counts["layer_norm"]), str(counts.get("to_rms_norm", 0))]
    cells += [str(_folded(plain.report)), merged, _counts(trained.report), f"{worst:.0e}", adapter.why]
    return "| " + " | ".join(cells) + " |"


def _counts(report: Report) -> str:
    return f"{report.counts.get('to_rms_norm', 0)} and {_folded(report)}"


def _folded(report: Report) -> int:
    """Norms whose γ and β are folded. A scaling that belongs to no norm is not counted."""
    return sum(site.kind == "LayerNorm" and "fold_affine" in site.rules for site in report.sites)
