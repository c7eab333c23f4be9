"""Text models of `transformers`: decoders, encoders, and both."""

from __future__ import annotations

from normfx.survey.family import Family, both, ids
from normfx.survey.transformers_models import DECODES, TEXT, WIDTHS, build, causal, masked, translating

ROTATED = {**WIDTHS, "num_key_value_heads": 2}

DECODERS = (
    causal("gpt2", "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=4),
    causal("openai-gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", n_embd=32, n_head=4),
    causal(
        "gpt-neo", "GPTNeoForCausalLM", "GPTNeoConfig", "12 of 24 layers", hidden_size=32, num_heads=4, num_layers=12,
        attention_types=[[["global", "local"], 6]],
    ),
    causal("pythia", "GPTNeoXForCausalLM", "GPTNeoXConfig", num_hidden_layers=12, **WIDTHS),
    causal("gpt-j", "GPTJForCausalLM", "GPTJConfig", "12 of 28 layers", n_embd=32, n_head=4, rotary_dim=4, n_layer=12),
    causal(
        "opt", "OPTForCausalLM", "OPTConfig", hidden_size=32, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32
    ),
    causal("bloom", "BloomForCausalLM", "BloomConfig", "12 of 24 layers", hidden_size=32, n_head=4, n_layer=12),
    causal("mpt", "MptForCausalLM", "MptConfig", "12 of 32 layers", d_model=32, n_heads=4, n_layers=12),
    causal(
        "falcon", "FalconForCausalLM", "FalconConfig", "12 of 32 layers", hidden_size=32, num_attention_heads=4,
        num_hidden_layers=12,
    ),
    causal("phi", "PhiForCausalLM", "PhiConfig", "12 of 24 layers", num_hidden_layers=12, **WIDTHS),
    causal("stablelm", "StableLmForCausalLM", "StableLmConfig", "12 of 32 layers", num_hidden_layers=12, **ROTATED),
    causal(
        "starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", "12 of 30 layers", num_hidden_layers=12, **ROTATED
    ),
    causal("command-r", "CohereForCausalLM", "CohereConfig", "12 of 40 layers", num_hidden_layers=12, **WIDTHS),
    causal(
        "xglm", "XGLMForCausalLM", "XGLMConfig", "12 of 24 layers", d_model=32, attention_heads=4, ffn_dim=64,
        num_layers=12,
    ),
    causal(
        "nemotron", "NemotronForCausalLM", "NemotronConfig", "12 of 32 layers", num_hidden_layers=12, head_dim=8,
        **ROTATED,
    ),
    causal("olmo", "OlmoForCausalLM", "OlmoConfig", "12 of 32 layers", num_hidden_layers=12, **WIDTHS),
    causal("rwkv", "RwkvForCausalLM", "RwkvConfig", hidden_size=32, num_hidden_layers=12),
    causal("llama", "LlamaForCausalLM", "LlamaConfig", "4 of 32 layers", num_hidden_layers=4, **WIDTHS),
    causal(
        "mixtral", "MixtralForCausalLM", "MixtralConfig", "4 of 32 layers", num_hidden_layers=4, num_local_experts=4,
        experts_implementation="batched_mm", **ROTATED,
    ),
    causal(
        "gemma2", "Gemma2ForCausalLM", "Gemma2Config", "4 of 26 layers", num_hidden_layers=4, head_dim=8, **ROTATED
    ),
    causal("qwen3", "Qwen3ForCausalLM", "Qwen3Config", "4 of 36 layers", num_hidden_layers=4, head_dim=8, **ROTATED),
    causal(
        "deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", "4 of 61 layers", num_hidden_layers=4,
        first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=16, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4, moe_intermediate_size=16,
        experts_implementation="batched_mm", **WIDTHS,
    ),
    causal("granite", "GraniteForCausalLM", "GraniteConfig", "4 of 40 layers", num_hidden_layers=4, **ROTATED),
    causal("olmo2", "Olmo2ForCausalLM", "Olmo2Config", "4 of 32 layers", num_hidden_layers=4, **WIDTHS),
    causal("mamba", "MambaForCausalLM", "MambaConfig", "4 of 24 layers", hidden_size=32, num_hidden_layers=4),
)  # fmt: skip

ENCODERS = (
    masked("bert", "BertForMaskedLM", "BertConfig"),
    masked("roberta", "RobertaForMaskedLM", "RobertaConfig"),
    masked("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", dim=32, n_heads=4, hidden_dim=64),
    masked("electra", "ElectraForPreTraining", "ElectraConfig", embedding_size=16),
    masked("albert", "AlbertForMaskedLM", "AlbertConfig", embedding_size=16),
    masked("deberta", "DebertaForMaskedLM", "DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    masked(
        "deberta-v3", "DebertaV2ForMaskedLM", "DebertaV2Config", num_hidden_layers=12, relative_attention=True,
        pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        position_biased_input=False,
    ),
    masked("mpnet", "MPNetForMaskedLM", "MPNetConfig"),
    causal("xlnet", "XLNetLMHeadModel", "XLNetConfig", d_model=32, n_head=4, d_inner=64, n_layer=12),
    masked("fnet", "FNetForMaskedLM", "FNetConfig"),
    masked(
        "esm2", "EsmForMaskedLM", "EsmConfig", position_embedding_type="rotary", token_dropout=True, mask_token_id=1,
        emb_layer_norm_before=False,
    ),
    masked(
        "modernbert", "ModernBertForMaskedLM", "ModernBertConfig", "12 of 22 layers", num_hidden_layers=12,
        cls_token_id=0, sep_token_id=0,
    ),
    masked("megatron-bert", "MegatronBertForMaskedLM", "MegatronBertConfig", "12 of 24 layers", num_hidden_layers=12),
    masked("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig"),
)  # fmt: skip

TRANSLATORS = (
    translating("bart", "BartForConditionalGeneration", "BartConfig", encoder_layers=6, decoder_layers=6),
    translating("mbart", "MBartForConditionalGeneration", "MBartConfig"),
    translating("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", "12 of 16 layers"),
    translating("marian", "MarianMTModel", "MarianConfig", encoder_layers=6, decoder_layers=6),
    translating("nllb", "M2M100ForConditionalGeneration", "M2M100Config"),
    translating(
        "blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", "14 of 26 layers", encoder_layers=2,
        decoder_layers=12,
    ),
    Family(
        "t5", "transformers",
        build(
            "T5ForConditionalGeneration", "T5Config", ("input_ids", "decoder_input_ids"), "logits", DECODES,
            **{**TEXT, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "decoder_start_token_id": 0},
        ),
        both(ids(), ids(2, 9)),
    ),
)  # fmt: skip

FAMILIES = (*DECODERS, *ENCODERS, *TRANSLATORS)
