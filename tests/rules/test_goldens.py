"""Plans and graphs that someone has read. EXPECTTEST_ACCEPT=1 pytest rewrites them; read the difference.

test_models.py proves the same models in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_float64, transformed
from excerpts import excerpt
from expecttest import TestCase
from torch import nn

from normfx.report import Report


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> torch.Tensor:
        out = self.model(*inputs)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def gpt2(dropout: float = 0.0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=100, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(config)), (torch.randint(0, 100, (2, 12)),)


def vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return Logits(transformers.ViTModel(config, add_pooling_layer=False)), (torch.randn(2, 3, 32, 32),)


class Observed(nn.Module):
    """A stream whose value before the last norm is also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.write = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.norm, self.final, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        x = x + self.write(self.norm(x))
        return self.head(self.final(x)), x


def observed() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Observed(), (torch.arange(6).reshape(2, 3),)


@functools.cache
def _report(
    build: Callable[..., tuple[nn.Module, tuple[torch.Tensor, ...]]], *args: float, training: bool = False
) -> Report:
    model, inputs = build(*args)
    if not training:
        assert_same_float64(model.eval(), inputs)
    return transformed(model.train(training), inputs)[1]


def _plan(report: Report) -> str:
    """The text of a report, in ASCII as expecttest wants it, without source lines, which change with the libraries."""
    text = str(report).translate({ord("γ"): "gamma", ord("β"): "beta", ord("×"): "x", ord("…"): ".."})
    return "\n".join(line for line in text.splitlines() if not line.startswith("    at "))


class Goldens(TestCase):
    maxDiff = None

    def test_gpt2_plan(self) -> None:
        self.assertExpectedInline(
            _plan(_report(gpt2)),
            """\
5 LayerNorms: all became RMSNorms, gamma and beta of all are folded into the weights
that read them and 4 are computed together with the residual add; predicted to
save 39.0 KiB of memory traffic per call.
Most frequent reasons why not more:
- fuse_residual_norm, 1 norm: the residual add broadcasts or mixes dtypes
  hint: none needed: the sum is computed before the norm

model.transformer.h.0.ln_1  LayerNorm  pre_rms_norm, fold_affine
  fuse_residual_norm refused (broadcast): the residual add broadcasts or mixes
    dtypes
    found: embedding_1
    hint: none needed: the sum is computed before the norm
model.transformer.h.{0,1}.ln_2 x2  LayerNorm
  pre_rms_norm, fold_affine, fuse_residual_norm
model.transformer.h.1.ln_1  LayerNorm
  pre_rms_norm, fold_affine, fuse_residual_norm
model.transformer.ln_f  LayerNorm  pre_rms_norm, fold_affine, fuse_residual_norm

Bytes per call that pass over activations and live weights, predicted:
  pre_rms_norm        46,080 to 33,792
  fold_affine         15,360 to 0
  fuse_residual_norm  12,288 to 0""",
        )

    def test_gpt2_graph(self) -> None:
        self.assertExpectedInline(
            excerpt(_report(gpt2).graphs[0].after),
            """\
%0 = embedding(model.transformer.wte.weight, <view>): f32[2, 12, 32]
%1 = center(%0, dim=2): f32[2, 12, 32]
%2 = embedding(model.transformer.wpe.weight, <unsqueeze>): f32[1, 12, 32]
%3 = center(%2, dim=2): f32[1, 12, 32]
%4 = add(%1, %3): f32[2, 12, 32]
%5 = rms_norm(%4, dim=2, eps=1e-05): f32[2, 12, 32]  # model.transformer.h.0.ln_1
%6 = fold_shift(model.transformer.h.0.attn.c_attn.weight, model.transformer.h.0.ln_1.bias, bias=model.transformer.h.0.attn.c_attn.bias, dim=0): f32[96]
%7 = scale_features(model.transformer.h.0.attn.c_attn.weight, model.transformer.h.0.ln_1.weight, dim=0): f32[32, 96]
%8 = addmm(%6, <view>, %7): f32[24, 96]
%9 = center(model.transformer.h.0.attn.c_proj.bias, dim=0): f32[32]
%10 = center(model.transformer.h.0.attn.c_proj.weight, dim=1): f32[32, 32]
%11 = addmm(%9, <view>, %10): f32[24, 32]
%12, %13 = add_rms_norm(<view>, %4, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.0.ln_2
%14 = fold_shift(model.transformer.h.0.mlp.c_fc.weight, model.transformer.h.0.ln_2.bias, bias=model.transformer.h.0.mlp.c_fc.bias, dim=0): f32[128]
%15 = scale_features(model.transformer.h.0.mlp.c_fc.weight, model.transformer.h.0.ln_2.weight, dim=0): f32[32, 128]
%16 = addmm(%14, <view>, %15): f32[24, 128]
%17 = add(<view>, <mul>): f32[2, 12, 128]
%18 = add(<tanh>, 1): f32[2, 12, 128]
%19 = center(model.transformer.h.0.mlp.c_proj.bias, dim=0): f32[32]
%20 = center(model.transformer.h.0.mlp.c_proj.weight, dim=1): f32[128, 32]
%21 = addmm(%19, <view>, %20): f32[24, 32]
%22, %23 = add_rms_norm(%13, <view>, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.1.ln_1
%24 = fold_shift(model.transformer.h.1.attn.c_attn.weight, model.transformer.h.1.ln_1.bias, bias=model.transformer.h.1.attn.c_attn.bias, dim=0): f32[96]
%25 = scale_features(model.transformer.h.1.attn.c_attn.weight, model.transformer.h.1.ln_1.weight, dim=0): f32[32, 96]
%26 = addmm(%24, <view>, %25): f32[24, 96]
%27 = center(model.transformer.h.1.attn.c_proj.bias, dim=0): f32[32]
%28 = center(model.transformer.h.1.attn.c_proj.weight, dim=1): f32[32, 32]
%29 = addmm(%27, <view>, %28): f32[24, 32]
%30, %31 = add_rms_norm(<view>, %23, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.1.ln_2
%32 = fold_shift(model.transformer.h.1.mlp.c_fc.weight, model.transformer.h.1.ln_2.bias, bias=model.transformer.h.1.mlp.c_fc.bias, dim=0): f32[128]
%33 = scale_features(model.transformer.h.1.mlp.c_fc.weight, model.transformer.h.1.ln_2.weight, dim=0): f32[32, 128]
%34 = addmm(%32, <view>, %33): f32[24, 128]
%35 = add(<view>, <mul>): f32[2, 12, 128]
%36 = add(<tanh>, 1): f32[2, 12, 128]
%37 = center(model.transformer.h.1.mlp.c_proj.bias, dim=0): f32[32]
%38 = center(model.transformer.h.1.mlp.c_proj.weight, dim=1): f32[128, 32]
%39 = addmm(%37, <view>, %38): f32[24, 32]
%40 = add_rms_norm(%31, <view>, dim=2, eps=1e-05): f32[2, 12, 32]  # model.transformer.ln_f
%41 = fold_shift(model.transformer.wte.weight, model.transformer.ln_f.bias, dim=1): f32[100]
%42 = scale_features(model.transformer.wte.weight, model.transformer.ln_f.weight, dim=1): f32[100, 32]
%43 = linear(<alias>, %42, %41): f32[2, 12, 100]
return [%43]
""",
        )

    def test_vit_plan(self) -> None:
        self.assertExpectedInline(
            _plan(_report(vit)),
            """\
3 LayerNorms: all became RMSNorms, gamma and beta of 2 are folded into the weights that
read them and 2 are computed together with the residual add; predicted to save
29.8 KiB of memory traffic per call.
Most frequent reasons why not more:
- fold_affine, 1 norm: the graph returns the norm's output
  hint: none needed: gamma and beta stay in the norm

model.layers.0.layernorm_before  LayerNorm  pre_rms_norm, fold_affine
model.layers.0.layernorm_after  LayerNorm
  pre_rms_norm, fold_affine, fuse_residual_norm
model.layernorm  LayerNorm  pre_rms_norm, fuse_residual_norm
  fold_affine refused (returned): the graph returns the norm's output
    hint: none needed: gamma and beta stay in the norm

Bytes per call that pass over activations and live weights, predicted:
  pre_rms_norm        39,168 to 26,112
  fold_affine         8,704 to 0
  fuse_residual_norm  8,704 to 0""",
        )

    def test_vit_graph(self) -> None:
        self.assertExpectedInline(
            excerpt(_report(vit).graphs[0].after),
            """\
%0 = center(model.embeddings.patch_embeddings.projection.weight, dim=0): f32[32, 3, 8, 8]
%1 = center(model.embeddings.patch_embeddings.projection.bias, dim=0): f32[32]
%2 = conv2d(inputs.0, %0, %1, [8, 8]): f32[2, 32, 4, 4]
%3 = center(<expand>, dim=2): f32[2, 1, 32]
%4 = cat([%3, <transpose>], 1): f32[2, 17, 32]
%5 = center(model.embeddings.position_embeddings, dim=2): f32[1, 17, 32]
%6 = add(%4, %5): f32[2, 17, 32]
%7 = rms_norm(%6, dim=2, eps=1e-12): f32[2, 17, 32]  # model.layers.0.layernorm_before
%8 = fold_shift(model.layers.0.attention.q_proj.weight, model.layers.0.layernorm_before.bias, bias=model.layers.0.attention.q_proj.bias, dim=1): f32[32]
%9 = scale_features(model.layers.0.attention.q_proj.weight, model.layers.0.layernorm_before.weight, dim=1): f32[32, 32]
%10 = linear(%7, %9, %8): f32[2, 17, 32]
%11 = fold_shift(model.layers.0.attention.k_proj.weight, model.layers.0.layernorm_before.bias, bias=model.layers.0.attention.k_proj.bias, dim=1): f32[32]
%12 = scale_features(model.layers.0.attention.k_proj.weight, model.layers.0.layernorm_before.weight, dim=1): f32[32, 32]
%13 = linear(%7, %12, %11): f32[2, 17, 32]
%14 = fold_shift(model.layers.0.attention.v_proj.weight, model.layers.0.layernorm_before.bias, bias=model.layers.0.attention.v_proj.bias, dim=1): f32[32]
%15 = scale_features(model.layers.0.attention.v_proj.weight, model.layers.0.layernorm_before.weight, dim=1): f32[32, 32]
%16 = linear(%7, %15, %14): f32[2, 17, 32]
%17 = center(model.layers.0.attention.o_proj.weight, dim=0): f32[32, 32]
%18 = center(model.layers.0.attention.o_proj.bias, dim=0): f32[32]
%19 = linear(<reshape>, %17, %18): f32[2, 17, 32]
%20, %21 = add_rms_norm(%19, %6, dim=2, eps=1e-12): f32[2, 17, 32], f32[2, 17, 32]  # model.layers.0.layernorm_after
%22 = fold_shift(model.layers.0.mlp.fc1.weight, model.layers.0.layernorm_after.bias, bias=model.layers.0.mlp.fc1.bias, dim=1): f32[64]
%23 = scale_features(model.layers.0.mlp.fc1.weight, model.layers.0.layernorm_after.weight, dim=1): f32[64, 32]
%24 = linear(%20, %23, %22): f32[2, 17, 64]
%25 = center(model.layers.0.mlp.fc2.weight, dim=0): f32[32, 64]
%26 = center(model.layers.0.mlp.fc2.bias, dim=0): f32[32]
%27 = linear(<gelu>, %25, %26): f32[2, 17, 32]
%28 = add_rms_norm(%27, %21, model.layernorm.weight, bias=model.layernorm.bias, dim=2, eps=1e-12): f32[2, 17, 32]  # model.layernorm
return [%28]
""",
        )

    def test_refusal_plan(self) -> None:
        self.assertExpectedInline(
            _plan(_report(observed)),
            """\
2 LayerNorms: none became an RMSNorm, gamma and beta of all are folded into the weights
that read them and 1 is computed together with the residual add; predicted to
save 576 bytes of memory traffic per call.
Most frequent reasons why not more:
- pre_rms_norm, 1 norm: a value enters the stream that can only be centred while
  the model runs, and that costs more than it saves
  hint: none needed: the norm stays a LayerNorm
- pre_rms_norm, 1 norm: the stream's mean is read by something other than a
  LayerNorm over the same features
  hint: do not return it; if only another part of the model reads it, compile
    the whole model, without graph breaks

norm  LayerNorm  fold_affine
  pre_rms_norm refused (uncentred_input): a value enters the stream that can
    only be centred while the model runs, and that costs more than it saves
    found: embedding (embedding rows)
    hint: none needed: the norm stays a LayerNorm
final  LayerNorm  fold_affine, fuse_residual_norm
  pre_rms_norm refused (observed): the stream's mean is read by something other
    than a LayerNorm over the same features
    found: add is read by output
    hint: do not return it; if only another part of the model reads it, compile
      the whole model, without graph breaks

Bytes per call that pass over activations and live weights, predicted:
  fold_affine         384 to 0
  fuse_residual_norm  192 to 0""",
        )

    def test_refusal_graph(self) -> None:
        report = _report(observed)
        self.assertExpectedInline(
            report.graphs[0].after,
            """\
ids: i64[2, 3]
%0 = embedding(table.weight, ids): f32[2, 3, 8]
%1 = layer_norm(%0, dim=2, eps=1e-05): f32[2, 3, 8]  # norm
%2 = fold_shift(write.weight, norm.bias, bias=write.bias, dim=1): f32[8]
%3 = scale_features(write.weight, norm.weight, dim=1): f32[8, 8]
%4 = linear(%1, %3, %2): f32[2, 3, 8]
%5, %6 = add_layer_norm(%0, %4, dim=2, eps=1e-05): f32[2, 3, 8], f32[2, 3, 8]  # final
%7 = fold_shift(head.weight, final.bias, bias=head.bias, dim=1): f32[3]
%8 = scale_features(head.weight, final.weight, dim=1): f32[3, 8]
%9 = linear(%5, %8, %7): f32[2, 3, 3]
return [%9, %6]
""",
        )

    def test_training_plan(self) -> None:
        """With dropout on the residual branches each write would have to be centred while the model runs (M12)."""
        self.assertExpectedInline(
            _plan(_report(gpt2, 0.1, training=True)),
            """\
5 LayerNorms: none became an RMSNorm, gamma and beta of all are folded into the weights
that read them and 4 are computed together with the residual add; predicted to
save 27.0 KiB of memory traffic per call.
Most frequent reasons why not more:
- pre_rms_norm, 5 norms: a value enters the stream that can only be centred
  while the model runs, and that costs more than it saves
  hint: none needed: the norm stays a LayerNorm

model.transformer.h.0.ln_1  LayerNorm  fold_affine
  pre_rms_norm refused (uncentred_input): a value enters the stream that can
    only be centred while the model runs, and that costs more than it saves
    found: dropout_1 (an activation or graph input) and 4 more
    hint: none needed: the norm stays a LayerNorm
model.transformer.h.{0,1}.ln_2 x2  LayerNorm  fold_affine, fuse_residual_norm
  pre_rms_norm refused (uncentred_input): as for model.transformer.h.0.ln_1
model.transformer.h.1.ln_1  LayerNorm  fold_affine, fuse_residual_norm
  pre_rms_norm refused (uncentred_input): as for model.transformer.h.0.ln_1
model.transformer.ln_f  LayerNorm  fold_affine, fuse_residual_norm
  pre_rms_norm refused (uncentred_input): as for model.transformer.h.0.ln_1

Bytes per call that pass over activations and live weights, predicted:
  fold_affine         15,360 to 0
  fuse_residual_norm  12,288 to 0""",
        )

    def test_training_graph(self) -> None:
        self.assertExpectedInline(
            excerpt(_report(gpt2, 0.1, training=True).graphs[0].after),
            """\
%0 = embedding(model.transformer.wte.weight, <view>): f32[2, 12, 32]
%1 = embedding(model.transformer.wpe.weight, <unsqueeze>): f32[1, 12, 32]
%2 = add(%0, %1): f32[2, 12, 32]
%3 = dropout(%2, 0.1, True): f32[2, 12, 32]
%4 = layer_norm(%3, dim=2, eps=1e-05): f32[2, 12, 32]  # model.transformer.h.0.ln_1
%5 = fold_shift(model.transformer.h.0.attn.c_attn.weight, model.transformer.h.0.ln_1.bias, bias=model.transformer.h.0.attn.c_attn.bias, dim=0): f32[96]
%6 = scale_features(model.transformer.h.0.attn.c_attn.weight, model.transformer.h.0.ln_1.weight, dim=0): f32[32, 96]
%7 = addmm(%5, <view>, %6): f32[24, 96]
%8 = addmm(model.transformer.h.0.attn.c_proj.bias, <view>, model.transformer.h.0.attn.c_proj.weight): f32[24, 32]
%9 = dropout(<view>, 0.1, True): f32[2, 12, 32]
%10, %11 = add_layer_norm(%9, %3, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.0.ln_2
%12 = fold_shift(model.transformer.h.0.mlp.c_fc.weight, model.transformer.h.0.ln_2.bias, bias=model.transformer.h.0.mlp.c_fc.bias, dim=0): f32[128]
%13 = scale_features(model.transformer.h.0.mlp.c_fc.weight, model.transformer.h.0.ln_2.weight, dim=0): f32[32, 128]
%14 = addmm(%12, <view>, %13): f32[24, 128]
%15 = add(<view>, <mul>): f32[2, 12, 128]
%16 = add(<tanh>, 1): f32[2, 12, 128]
%17 = addmm(model.transformer.h.0.mlp.c_proj.bias, <view>, model.transformer.h.0.mlp.c_proj.weight): f32[24, 32]
%18 = dropout(<view>, 0.1, True): f32[2, 12, 32]
%19, %20 = add_layer_norm(%11, %18, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.1.ln_1
%21 = fold_shift(model.transformer.h.1.attn.c_attn.weight, model.transformer.h.1.ln_1.bias, bias=model.transformer.h.1.attn.c_attn.bias, dim=0): f32[96]
%22 = scale_features(model.transformer.h.1.attn.c_attn.weight, model.transformer.h.1.ln_1.weight, dim=0): f32[32, 96]
%23 = addmm(%21, <view>, %22): f32[24, 96]
%24 = addmm(model.transformer.h.1.attn.c_proj.bias, <view>, model.transformer.h.1.attn.c_proj.weight): f32[24, 32]
%25 = dropout(<view>, 0.1, True): f32[2, 12, 32]
%26, %27 = add_layer_norm(%25, %20, dim=2, eps=1e-05): f32[2, 12, 32], f32[2, 12, 32]  # model.transformer.h.1.ln_2
%28 = fold_shift(model.transformer.h.1.mlp.c_fc.weight, model.transformer.h.1.ln_2.bias, bias=model.transformer.h.1.mlp.c_fc.bias, dim=0): f32[128]
%29 = scale_features(model.transformer.h.1.mlp.c_fc.weight, model.transformer.h.1.ln_2.weight, dim=0): f32[32, 128]
%30 = addmm(%28, <view>, %29): f32[24, 128]
%31 = add(<view>, <mul>): f32[2, 12, 128]
%32 = add(<tanh>, 1): f32[2, 12, 128]
%33 = addmm(model.transformer.h.1.mlp.c_proj.bias, <view>, model.transformer.h.1.mlp.c_proj.weight): f32[24, 32]
%34 = dropout(<view>, 0.1, True): f32[2, 12, 32]
%35 = add_layer_norm(%27, %34, dim=2, eps=1e-05): f32[2, 12, 32]  # model.transformer.ln_f
%36 = fold_shift(model.transformer.wte.weight, model.transformer.ln_f.bias, dim=1): f32[100]
%37 = scale_features(model.transformer.wte.weight, model.transformer.ln_f.weight, dim=1): f32[100, 32]
%38 = linear(<alias>, %37, %36): f32[2, 12, 100]
return [%38]
""",
        )
