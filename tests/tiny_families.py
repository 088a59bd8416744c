"""Miniature configurations of the decoder-only families of transformers.

``tiny_config`` shrinks a family's default configuration: fields are known by the names that the
families share (SIZES), and families with other needs have an entry in OWN.
"""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 264
# Small values of fields that many families have. Two layers of each kind are enough.
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    vocab_size_per_layer_input=VOCAB,
    hidden_size=64,
    hidden_size_per_layer_input=8,
    intermediate_size=96,
    intermediate_size_mlp=96,
    ffn_hidden_size=96,
    shared_intermediate_size=32,
    moe_intermediate_size=32,
    expert_ffn_hidden_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    num_hidden_layers=2,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    sliding_window=8,
    attention_window_size=8,
    query_pre_attn_scalar=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    zero_expert_num=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
    num_mtp_layers=0,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    qk_head_dim=24,
    v_head_dim=16,
    mamba_n_heads=8,
    mamba_num_heads=8,
    n_mamba_heads=2,
    mamba_d_head=16,
    mamba_head_dim=16,
    mamba_d_ssm=128,
    mamba_d_state=8,
    ssm_state_size=8,
    state_size=8,
    mamba_chunk_size=16,
    chunk_size=16,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
_LATENT = dict(num_key_value_heads=4, head_dim=8)
_GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)
# Entries that differ from SIZES, by family.
OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "bamba": dict(attn_layer_indices=[1]),
    "bloom": dict(n_layer=2, n_head=4),
    "codegen": dict(**_GPT2, rotary_dim=8),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": dict(num_kv_heads=1),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "glm4_moe_lite": _LATENT,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gptj": dict(**_GPT2, rotary_dim=8),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "longcat_flash": dict(num_key_value_heads=4, head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1),
    "minicpm3": dict(num_key_value_heads=4, head_dim=None),
    "mpt": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "moe"], n_groups=2),
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64),
    "qwen3_5_moe_text": dict(layer_types=_LINEAR_THEN_FULL),
    "qwen3_5_text": dict(layer_types=_LINEAR_THEN_FULL),
    "qwen3_next": dict(layer_types=_LINEAR_THEN_FULL),
    "recurrent_gemma": dict(num_key_value_heads=1, num_hidden_layers=3, lru_width=64),
    "xglm": dict(d_model=64, ffn_dim=96, attention_heads=4),
    "youtu": _LATENT,
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_hidden_layers=4,
        mamba_ngroups=1,
        n_mamba_heads=8,
    ),
}


# Families that people train often, or that stand for a kind of attention or layer.
COMMON = (
    *("bamba", "bloom", "cohere2", "deepseek_v2", "deepseek_v3", "exaone4", "falcon", "falcon_h1"),
    *("gemma2", "gemma3_text", "gemma3n_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "gptj"),
    *("granite", "granitemoehybrid", "jamba", "lfm2", "llama", "llama4_text", "mamba2"),
    *("minicpm3", "mistral", "mixtral", "mpt", "nemotron_h", "olmo2", "olmo3", "opt", "phi3"),
    *("qwen2", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma", "smollm3", "stablelm"),
    *("starcoder2", "zamba2"),
)
# The other decoder-only families that have a miniature.
RARE = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "codegen"),
    *("cohere", "cohere2_moe", "cwm", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe"),
    *("exaone", "exaone_moe", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma4_text", "glm"),
    *("glm4_moe", "glm4_moe_lite", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "granite_swa"),
    *("granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe"),
    *("kolibri1", "laguna", "lara_mini", "lfm2_moe", "longcat_flash", "mamba", "mellum"),
    *("mimo_v2_flash", "minimax_m2", "ministral", "ministral3", "modernbert-decoder", "nanochat"),
    *("nemotron", "olmo", "olmo_hybrid", "olmoe", "persimmon", "phi", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "sarvam_moe", "seed_oss", "solar_open", "vaultgemma"),
    *("xglm", "youtu"),
)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return a configuration of `family` of about two layers of width 64.

    Args:
        family: transformers' model_type of a decoder-only language model.
        overrides: further entries, by transformers' names.
    """
    kind = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(kind)}
    if "text_config" in fields:
        text = tiny_config(kind.sub_configs["text_config"].model_type, **overrides)
        return kind(text_config=text.to_dict())
    values = {name: value for name, value in SIZES.items() if name in fields}
    return kind(**{**values, **OWN.get(family, {}), **overrides})


def tiny_family_model(
    family: str, *, std: float = 0.2, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Return a causal language model of ``tiny_config`` with random weights, in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **overrides), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=std)
    return model.eval()
