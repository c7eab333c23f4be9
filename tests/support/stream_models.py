"""Small models of published forms of streams: of real libraries where there is one, else written from the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import NO_SPECIAL, TEXT, VISION, Call, _causal, _floats, _hf, _ids, _timm_cait, _timm_mixer
from torch import Tensor, nn

D, HEADS = 16, 2


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int = HEADS) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Block(nn.Module):
    """One block over (batch, tokens, D).

    post:      LN(x + f(x)), both halves                                 "Attention Is All You Need"
    pre:       x + f(LN(x))
    deep:      LN(αx + f(x))                                             DeepNet, eq. 4; GLM-130B
    peri:      x + LN(f(LN(x)))                                          Peri-LN, figure 1
    hybrid:    attention with normalised q, k, v; then LN(x + f(x))      HybridNorm, eq. 3
    former:    x + LN(head-scaled attention(LN(x))); x + W₂ LN(gelu(W₁ LN(x)))   NormFormer, section 2
    sub:       x + W LN(attention(LN(x))); x + W₂ LN(gelu(W₁ LN(x)))     Foundation Transformers (Magneto), figure 2
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.extra1, self.extra2 = nn.LayerNorm(D), nn.LayerNorm(D if kind == "peri" else 2 * D)
        self.heads = nn.ModuleList(nn.LayerNorm(D // HEADS) for _ in range(3))
        self.head_scale = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        if self.kind == "hybrid":
            parts = [n(t.unflatten(-1, (HEADS, -1))).flatten(-2) for n, t in zip(self.heads, parts, strict=True)]
        y = attention(*parts)
        if self.kind == "sub":
            y = self.extra1(y)
        if self.kind == "former":
            y = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) * self.head_scale).transpose(1, 2).flatten(-2)
        out: Tensor = self.out(y)
        return out

    def feed(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x))
        if self.kind in ("sub", "former"):
            y = self.extra2(y)
        out: Tensor = self.down(y)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("post", "deep"):
            alpha = 1.7 if self.kind == "deep" else 1.0
            x = self.norm1(alpha * x + self.attend(x))
            x = self.norm2(alpha * x + self.feed(x))
        elif self.kind == "hybrid":
            x = x + self.attend(x)
            x = self.norm2(x + self.feed(self.norm1(x)))
        elif self.kind == "peri":
            x = x + self.extra1(self.attend(self.norm1(x)))
            x = x + self.extra2(self.feed(self.norm2(x)))
        elif self.kind == "former":
            x = x + self.extra1(self.attend(self.norm1(x)))
            x = x + self.feed(self.norm2(x))
        else:
            x = x + self.attend(self.norm1(x))
            x = x + self.feed(self.norm2(x))
        return x


class Tokens(nn.Module):
    """Blocks over an embedding, and a head."""

    def __init__(self, *kinds: str, final: bool = True) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(100, D), nn.ModuleList(Block(kind) for kind in kinds)
        self.final, self.head = nn.LayerNorm(D) if final else nn.Identity(), nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.final(x))
        return out


class Dense(nn.Module):
    """A learned average over all depths before each block (DenseFormer, eq. 1), steps of an ODE solver between blocks
    (Neural-ODE layers), the mean of parallel middle blocks (Transformer Layers as Painters)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(100, D), nn.ModuleList(Block("pre") for _ in range(4))
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(i + 2)) for i in range(2))
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        depths = [x]
        for block, weights in zip(self.blocks, self.weights, strict=False):
            depths.append(block(x))
            x = sum((w * d for w, d in zip(weights, depths, strict=True)), torch.zeros_like(x))
        step = self.blocks[2]
        slope = step(x) - x
        x = x + 0.5 * (slope + step(x + 0.5 * slope) - (x + 0.5 * slope))
        x = torch.stack([self.blocks[2](x), self.blocks[3](x)]).mean(0)
        out: Tensor = self.head(self.final(x))
        return out


class ScaleNorm(nn.Module):
    """g·x/‖x‖ ("Transformers without Tears", eq. 5) on a stream; rows of the output table of length 1 (FixNorm)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write, self.read = nn.Embedding(100, D), nn.Linear(D, D), nn.Linear(D, D)
        self.g = nn.ParameterList(nn.Parameter(torch.tensor(float(D) ** 0.5)) for _ in range(2))

    def norm(self, x: Tensor, g: Tensor) -> Tensor:
        return x * (g / torch.linalg.vector_norm(x, dim=-1, keepdim=True))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.write(F.relu(self.read(self.norm(x, self.g[0]))))
        return F.linear(self.norm(x, self.g[1]), F.normalize(self.table.weight, dim=-1))


class Exits(nn.Module):
    """Pre-norm blocks with a head after each, through the final norm (LayerSkip); `raw` reads the stream itself, as
    "Jump to Conclusions" does."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(100, D), nn.ModuleList(Block("pre") for _ in range(3))
        self.final, self.head, self.jump = nn.LayerNorm(D), nn.Linear(D, 5), nn.Linear(D, D)
        self.raw = raw

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x, outs = self.table(ids), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            outs.append(self.head(self.final(self.jump(x) if self.raw and i == 1 else x)))
        return tuple(outs)


class Adapters(nn.Module):
    """Pre-norm blocks with a bottleneck adapter as a writer (Compacter), a bias for each token (AdapterBias), prompts
    joined to the tokens, and with `tap` a raw reader of all layers (UniPT)."""

    def __init__(self, tap: bool = False) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(100, D), nn.ModuleList(Block("pre") for _ in range(2))
        self.prompt, self.shift = nn.Parameter(torch.randn(1, 3, D)), nn.Parameter(torch.randn(D))
        self.down, self.up, self.token = nn.Linear(D, 4), nn.Linear(4, D), nn.Linear(D, 1)
        self.norm, self.final, self.head, self.side = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 5), nn.Linear(D, 5)
        self.tap = tap

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.prompt.expand(ids.shape[0], -1, -1), self.table(ids)], 1)
        taps = []
        for block in self.blocks:
            x = block(x)
            y = self.norm(x)
            x = x + self.up(F.gelu(self.down(y))) + self.token(y) * self.shift
            taps.append(x)
        out: Tensor = self.head(self.final(x))
        return out + sum(self.side(t) for t in taps) if self.tap else out


class Experts(nn.Module):
    """A pre-norm stream whose feed-forward is a Mixtral-like mixture: each token to two of three experts."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.table, self.block, self.norm = nn.Embedding(100, D), Block("pre"), nn.LayerNorm(D)
        self.router, self.final, self.head = nn.Linear(D, 3), nn.LayerNorm(D), nn.Linear(D, 5)
        self.ups = nn.ModuleList(nn.Linear(D, 8) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(8, D) for _ in range(3))
        self.packed = packed
        self.codes: Tensor
        self.register_buffer("codes", torch.arange(D * 8, dtype=torch.int8).reshape(D, 8))

    def write(self, i: int, h: Tensor) -> Tensor:
        if self.packed and i == 1:
            return F.linear(h, self.codes.to(h.dtype) * 0.01)
        out: Tensor = self.downs[i](h)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.table(ids))
        y = self.norm(x)
        gates, chosen = self.router(y).softmax(-1).topk(2, -1)
        mixed = torch.zeros_like(x)
        for i, up in enumerate(self.ups):
            gate = (gates * (chosen == i)).sum(-1, keepdim=True)
            mixed = mixed + gate * self.write(i, F.gelu(up(y)))
        out: Tensor = self.head(self.final(x + mixed))
        return out


class Pruned(nn.Module):
    """Tokens are dropped between blocks by a score, and the dropped ones merged into one (EViT, eq. 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(100, D), nn.ModuleList(Block("pre") for _ in range(2))
        self.final, self.head, self.score = nn.LayerNorm(D), nn.Linear(D, 5), nn.Linear(D, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[0](self.table(ids))
        score = self.score(self.final(x)).squeeze(-1)
        order = score.argsort(1)
        kept, dropped = (i.unsqueeze(-1).expand(-1, -1, x.shape[-1]) for i in (order[:, 4:], order[:, :4]))
        weight = score.gather(1, order[:, :4]).softmax(1)
        merged = (x.gather(1, dropped) * weight.unsqueeze(-1)).sum(1, keepdim=True)
        x = self.blocks[1](torch.cat([x.gather(1, kept), merged], 1))
        out: Tensor = self.head(self.final(x))
        return out


def _timm(name: str, **sizes: Any) -> Any:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **sizes)
        return model

    return build


def _parallel_vit() -> nn.Module:
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    model: nn.Module = VisionTransformer(
        32, 8, num_classes=5, embed_dim=32, depth=2, num_heads=4, block_fn=ParallelThingsBlock
    )
    return model


def _vit22b() -> nn.Module:
    """Attention and feed-forward in parallel, q and k normalised by head."""
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    model: nn.Module = VisionTransformer(
        32, 8, num_classes=5, embed_dim=32, depth=2, num_heads=4, qk_norm=True, block_fn=ParallelScalingBlock
    )
    return model


def _peft(kind: str) -> nn.Module:
    """GPT-2 with adapters of peft, their B away from its zeros."""
    import peft
    import transformers

    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=32, **NO_SPECIAL)
    )
    config = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ia3": lambda: peft.IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    }[kind]()
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "ia3" in name:
                p.add_(0.1 * torch.randn_like(p))
    return Call(model, "logits", use_cache=False)


BARE = {"add_pooling_layer": False}
_WINDOWS = dict(
    image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
)
_SEQ2SEQ = dict(
    vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
    decoder_start_token_id=2, **NO_SPECIAL,
)  # fmt: skip
_SMALL = dict(num_classes=5, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


def _words() -> tuple[Tensor, ...]:
    return (_ids(2, 12),)


def _picture() -> tuple[Tensor, ...]:
    return (_floats(2, 3, 32, 32),)


def _bert() -> nn.Module:
    return _hf("BertModel", "BertConfig", "last_hidden_state", BARE, **TEXT)()


ROWS: dict[str, tuple[Any, Any]] = {
    "bert": (_bert, _words),
    "mix": (lambda: Tokens("post", "pre", "pre"), _words),
    "peri": (lambda: Tokens("peri", "peri"), _words),
    "olmo2": (_causal("Olmo2ForCausalLM", "Olmo2Config"), _words),
    "hybrid": (lambda: Tokens("hybrid", "hybrid", final=False), _words),
    "normformer": (lambda: Tokens("former", "former"), _words),
    "magneto": (lambda: Tokens("sub", "sub"), _words),
    "deepnorm": (lambda: Tokens("deep", "deep", final=False), _words),
    "depth": (Dense, _words),
    "swin v2": (_hf("Swinv2Model", "Swinv2Config", "last_hidden_state", BARE, **_WINDOWS), _picture),
    "swin": (_hf("SwinModel", "SwinConfig", "last_hidden_state", BARE, **_WINDOWS), _picture),
    "vit 22b": (_vit22b, _picture),
    "qwen3": (_causal("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, num_key_value_heads=2), _words),
    "scale norm": (ScaleNorm, _words),
    "deit-iii": (_timm("deit3_small_patch16_224", **_SMALL), _picture),
    "beit": (_hf("BeitModel", "BeitConfig", "pooler_output", **VISION), _picture),
    "cait": (_timm_cait, _picture),
    "convnext": (
        _hf("ConvNextModel", "ConvNextConfig", "last_hidden_state", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
        _picture,
    ),
    "parallel": (_parallel_vit, _picture),
    "exits": (Exits, _words),
    "jump": (lambda: Exits(raw=True), _words),
    "drop path": (_timm("deit3_small_patch16_224", **_SMALL, drop_path_rate=0.9), _picture),
    "clip": (_hf("CLIPVisionModel", "CLIPVisionConfig", "pooler_output", **VISION), _picture),
    "mbart": (
        _hf("MBartForConditionalGeneration", "MBartConfig", "logits", **_SEQ2SEQ),
        lambda: (_ids(2, 8), torch.ones(2, 8, dtype=torch.int64), _ids(2, 6)),
    ),
    "experts": (Experts, _words),
    "packed expert": (lambda: Experts(packed=True), _words),
    "mixtral": (
        _causal(
            "MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
        ),
        _words,
    ),
    "lora": (lambda: _peft("lora"), _words),
    "prompts": (lambda: _peft("prompt"), _words),
    "ia3": (lambda: _peft("ia3"), _words),
    "adapters": (Adapters, _words),
    "taps": (lambda: Adapters(tap=True), _words),
    "pruned": (Pruned, _words),
    "eva-02": (
        _timm("eva02_tiny_patch14_224", **{**_SMALL, "embed_dim": 48}), _picture,
    ),
    "mixer": (_timm_mixer, _picture),
    "pvt v2": (_timm("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1), embed_dims=(16, 16, 40, 64)), _picture),
    "tsmixer": (
        _hf(
            "PatchTSMixerModel", "PatchTSMixerConfig", "last_hidden_state", context_length=16, patch_length=4,
            patch_stride=4, num_input_channels=2, d_model=16, num_layers=2, norm_mlp="LayerNorm",
        ),
        lambda: (_floats(2, 16, 2),),
    ),
    "granite": (_causal("GraniteForCausalLM", "GraniteConfig", residual_multiplier=0.5), _words),
    "cohere": (_causal("CohereForCausalLM", "CohereConfig"), _words),
}  # fmt: skip
"""By row of the systems that the product answers for: how to build the model, and its inputs."""

TRAINED = {"drop path"}
"""Models in training mode."""
PACKAGES = {
    "timm": ("vit", "deit", "drop path", "parallel", "eva", "pvt", "cait", "mixer"),
    "peft": ("lora", "prompts", "ia3"),
    "transformers": ("",),
}


def built(row: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Norms, biases and scales away from ones and zeros, so that a wrong fold shows."""
    for package, words in PACKAGES.items():
        if any(word in row for word in words):
            pytest.importorskip(package)
    torch.manual_seed(0)
    build, inputs = ROWS[row]
    model = build().train(row in TRAINED)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim <= 1:
                p.add_(0.3 * torch.randn_like(p))
    return model, inputs()
