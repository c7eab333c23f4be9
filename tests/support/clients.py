"""Libraries that people use normfx through, each as its own users call it: compiled by normfx next to eager.

Models are small, with random weights; nothing is downloaded. How a model is compiled is the line that docs/clients.md
prints.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfx
from normfx.report import Report


@dataclass(frozen=True)
class Outcome:
    """How far results are from eager's, relative to the largest entry, and what normfx reports."""

    difference: float
    report: Report


@dataclass(frozen=True)
class Client:
    """A way to use a library. package: what it is imported by; compiled: how a model of it is compiled"""

    distribution: str
    package: str
    what: str
    compiled: str
    run: Callable[[], Outcome]


CLIENTS: list[Client] = []


def client(distribution: str, what: str, compiled: str, package: str = "") -> Callable[[Callable[[], Outcome]], Any]:
    """Adds a way to use a library to the table."""

    def add(run: Callable[[], Outcome]) -> Callable[[], Outcome]:
        CLIENTS.append(Client(distribution, package or distribution.replace("-", "_"), what, compiled, run))
        return run

    return add


def outcome(actual: Any, expected: Any) -> Outcome:
    """Compares results entry by entry; lists are compared as one."""
    found, wanted = (torch.stack(x) if isinstance(x, list) else x for x in (actual, expected))
    assert found.shape == wanted.shape
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return Outcome(difference.item(), normfx.compiled_report())


def encoder() -> nn.Module:
    """Two pre-norm blocks of sequences with 8 features."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(64), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 64), blocks)


def trained_looking(model: nn.Module) -> nn.Module:
    """Norms with a scale and a shift that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            for p in module.parameters():
                p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---------------------------------------------------------------- transformers


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return trained_looking(GPT2LMHeadModel(config)).eval()


@client("transformers", "generate, dynamic cache", 'model.forward = torch.compile(model.forward, backend="normfx")')
def _() -> Outcome:
    model, prompt = gpt2(), torch.arange(5).view(1, 5)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    model.forward = torch.compile(model.forward, backend="normfx")
    return outcome(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)


@client(
    "transformers",
    "generate, static cache",
    'model.generate(..., cache_implementation="static", compile_config=CompileConfig(backend="normfx", mode=None))',
)
def _() -> Outcome:
    from transformers import CompileConfig

    model, prompt = gpt2(), torch.arange(5).view(1, 5)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    config = CompileConfig(backend="normfx", mode=None)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    static = dict(cache_implementation="static", compile_config=config)
    return outcome(model.generate(prompt, max_new_tokens=8, do_sample=False, **static), expected)


@client("transformers", "pipeline", 'model.compile(backend="normfx")')
def _() -> Outcome:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model = trained_looking(ViTForImageClassification(config)).eval()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    classify: Any = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    image = Image.new("RGB", (16, 16), (200, 30, 20))

    def scores() -> Tensor:
        return torch.tensor([each["score"] for each in sorted(classify(image), key=lambda each: each["label"])])

    expected = scores()
    model.compile(backend="normfx")
    return outcome(scores(), expected)


@client("accelerate", "prepare, backward", 'model.compile(backend="normfx"); accelerator.prepare(model, optimizer)')
def _() -> Outcome:
    from accelerate import Accelerator

    x = torch.randn(64, 32, 8)

    def trained(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model: Any = trained_looking(encoder())
        if compiled:
            model.compile(backend="normfx")
        accelerator = Accelerator(cpu=True)
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(3):
            loss = (model(x)[..., :8] - x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    expected = trained(False)
    return outcome(trained(True), expected)


# ---------------------------------------------------------------- adapters and quantised weights


@client("peft", "LoRA: merge and unmerge", 'torch.compile(model, backend="normfx")')
def _() -> Outcome:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    model: Any = get_peft_model(gpt2(), lora).eval()
    compiled, tokens = torch.compile(model, backend="normfx"), torch.arange(16).view(1, 16)
    actual, expected = [], []
    with torch.no_grad():
        for change in (lambda: None, model.merge_adapter, model.unmerge_adapter):
            change()
            actual.append(compiled(input_ids=tokens).logits)
            expected.append(model(input_ids=tokens).logits)
    return outcome(actual, expected)


@client(
    "peft", "LoRA: hot-swapped", 'prepare_model_for_compiled_hotswap(model); torch.compile(model, backend="normfx")'
)
def _() -> Outcome:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    base, tokens = gpt2(), torch.arange(16).view(1, 16)
    with folder() as path, torch.no_grad():
        for name, rank in (("first", 4), ("second", 8)):
            lora = LoraConfig(r=rank, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
            get_peft_model(copy.deepcopy(base), lora).save_pretrained(str(path / name))
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(path / "first"))
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        compiled = torch.compile(model, backend="normfx")
        actual = [compiled(input_ids=tokens).logits]
        hotswap_adapter(model, str(path / "second"), adapter_name="default")
        actual.append(compiled(input_ids=tokens).logits)
        loaded = (PeftModel.from_pretrained(copy.deepcopy(base), str(path / name)) for name in ("first", "second"))
        expected = [each(input_ids=tokens).logits for each in loaded]
    return outcome(actual, expected)


@client("torchao", "int8 weights", 'quantize_(model, Int8WeightOnlyConfig()); torch.compile(model, backend="normfx")')
def _() -> Outcome:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model: Any = vit()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return outcome(torch.compile(model, backend="normfx")(x), model(x))


# ---------------------------------------------------------------- vision, text and images, sentences


def vit() -> nn.Module:
    import timm

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return trained_looking(timm.create_model("vit_tiny_patch16_224", **sizes)).eval()


@client("timm", "create_model", 'torch.compile(model, backend="normfx")')
def _() -> Outcome:
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return outcome(torch.compile(model, backend="normfx")(x), model(x))


@client("open-clip-torch", "CLIP", 'torch.compile(model, backend="normfx")', package="open_clip")
def _() -> Outcome:
    import open_clip

    vision = dict(layers=2, width=32, head_width=16, patch_size=4, image_size=16)
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=2)
    model: Any = trained_looking(open_clip.model.CLIP(16, vision_cfg=vision, text_cfg=text)).eval()
    inputs = torch.randn(2, 3, 16, 16), torch.randint(1, 49, (2, 8))
    with torch.no_grad():
        actual, expected = torch.compile(model, backend="normfx")(*inputs), model(*inputs)
    return outcome(list(actual[:2]), list(expected[:2]))


@client("diffusers", "a whole transformer", 'transformer.compile(backend="normfx")')
def _() -> Outcome:
    model, call = _flux()
    expected = call()
    model.compile(backend="normfx")
    return outcome(call(), expected)


@client("diffusers", "repeated blocks", 'transformer.compile_repeated_blocks(backend="normfx")')
def _() -> Outcome:
    model, call = _flux()
    expected = call()
    model.compile_repeated_blocks(backend="normfx")
    return outcome(call(), expected)


def _flux() -> tuple[Any, Callable[[], Tensor]]:
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    ids = torch.zeros(16, 3), torch.zeros(6, 3)
    inputs = dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 6, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]), img_ids=ids[0], txt_ids=ids[1],
    )  # fmt: skip

    @torch.no_grad()
    def call() -> Tensor:
        result: Tensor = model(**inputs).sample
        return result

    return model, call


@client("sentence-transformers", "encode", 'model.compile(backend="normfx")')
def _() -> Outcome:
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertTokenizer, ModernBertConfig, ModernBertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "on", "mat", "a", "ran"]
    with folder() as path:
        (path / "vocab.txt").write_text("\n".join(words))
        BertTokenizer(str(path / "vocab.txt")).save_pretrained(str(path))
        config = ModernBertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=None, cls_token_id=2,
            sep_token_id=3,
        )  # fmt: skip
        trained_looking(ModernBertModel(config)).save_pretrained(str(path))
        transformer = models.Transformer(str(path))
    pooling = models.Pooling(transformer.get_embedding_dimension())
    model: Any = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    sentences = ["the cat sat on the mat", "a dog ran"]
    expected = model.encode(sentences, convert_to_tensor=True)
    model.compile(backend="normfx")
    return outcome(model.encode(sentences, convert_to_tensor=True), expected)


# ---------------------------------------------------------------- Lightning


@client("lightning", "Trainer.fit", 'module = torch.compile(module, backend="normfx"); trainer.fit(module, data)')
def _() -> Outcome:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.head, self.losses = trained_looking(encoder()), nn.Linear(64, 2), []

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, label = batch
            return nn.functional.cross_entropy(self.head(self.net(x).mean(1)), label)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(outputs["loss"].detach())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = [(torch.randn(64, 32, 8), torch.randint(0, 2, (64,))) for _ in range(3)]

    def losses(compiled: bool) -> list[Tensor]:
        module: Any = Classifier()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer: Any = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
        fitted = torch.compile(module, backend="normfx") if compiled else module
        trainer.fit(fitted, torch.utils.data.DataLoader(data, batch_size=None))
        return module.losses

    expected = losses(False)
    return outcome(losses(True), expected)
