"""Tiny random bases of many architectures, with a byte tokenizer. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from fedlora.learn.toy import _byte_tokenizer

VOCABULARY = 264
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "bos_token_id": None,
    "pad_token_id": None,
}
_GATED = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2}
_EXPERTS = {**_GATED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_ctx": 256,
    "eos_token_id": 257,
    "bos_token_id": None,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "eos_token_id": 257,
    "bos_token_id": None,
    "pad_token_id": None,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_d_ssm": 128,
    "mamba_d_conv": 4,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
}
WINDOW = 24
"""Tokens that a layer with a sliding window sees: fewer than the rows of the tests have."""


@dataclass(frozen=True)
class Family:
    """A kind of base.

    Attributes:
        type: transformers' ``model_type``.
        kind: for the table, in a word or two.
    """

    type: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    text: bool = False


def _of(kind: str, type: str, *parts: Mapping[str, Any], **more: Any) -> Family:
    config: dict[str, Any] = {}
    for part in parts or (_GATED,):
        config |= part
    return Family(type, kind, {**config, **more})


FAMILIES: Mapping[str, Family] = {
    "Llama": _of("dense", "llama"),
    "Llama, tied": _of("dense, tied head", "llama", tie_word_embeddings=True),
    "Qwen2": _of("dense, biases", "qwen2"),
    "Qwen2, windowed": _of(
        "windows in some layers", "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "Qwen3": _of("dense", "qwen3", head_dim=16),
    "SmolLM3": _of("dense, NoPE layers", "smollm3", no_rope_layer_interval=2),
    "Mistral": _of("window", "mistral", sliding_window=WINDOW),
    "Mistral, no window": _of("dense", "mistral", sliding_window=None),
    "Ministral": _of(
        "windows in some layers",
        "ministral",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=16,
    ),
    "Gemma": _of("dense, tied head", "gemma", head_dim=16),
    "Gemma 2": _of("windows in some layers, capped scores", "gemma2", head_dim=16, sliding_window=WINDOW),
    "Gemma 3 (text)": _of(
        "windows in some layers",
        "gemma3_text",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Gemma 3 (MedGemma)": Family("gemma3", "vision-language wrapper, windows"),
    "Phi": _of("dense", "phi", partial_rotary_factor=0.5),
    "Phi-3": _of("fused qkv and gate_up", "phi3", sliding_window=None),
    "Phi-3, windowed": _of("fused, window", "phi3", sliding_window=WINDOW),
    "Falcon": _of("fused qkv", "falcon", _COMMON, alibi=False, multi_query=True),
    "Falcon, ALiBi": _of("ALiBi", "falcon", _COMMON, alibi=True, multi_query=False, new_decoder_architecture=False),
    "OPT": _of("learned positions", "opt", _COMMON, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "GPT-NeoX (Pythia)": _of("fused qkv", "gpt_neox", _COMMON, intermediate_size=128),
    "GPT-J": _of("dense", "gptj", _GPT2, rotary_dim=8),
    "GPT-2": _of("Conv1D", "gpt2", _GPT2),
    "GPT-Neo": _of(
        "local attention",
        "gpt_neo",
        {**_COMMON, "num_layers": 2, "num_heads": 4},
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "GPT-BigCode (StarCoder)": _of("fused qkv", "gpt_bigcode", _GPT2),
    "CodeGen": _of("fused qkv", "codegen", _GPT2, rotary_dim=8),
    "BLOOM": _of(
        "ALiBi, fused qkv",
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "eos_token_id": 257,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "MPT": _of(
        "ALiBi, fused qkv",
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 256,
            "eos_token_id": 257,
            "bos_token_id": None,
        },
    ),
    "XGLM": _of(
        "sinusoidal positions",
        "xglm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 128,
            "eos_token_id": 257,
            "dropout": 0.0,
        },
    ),
    "BioGPT": _of("learned positions", "biogpt", _COMMON, intermediate_size=128, pad_token_id=256),
    "Granite": _of("scaled logits", "granite", logits_scaling=3.0),
    "Cohere": _of("scaled logits", "cohere", logit_scale=0.25),
    "Cohere 2": _of(
        "windows in some layers",
        "cohere2",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=16,
    ),
    "StableLM": _of("dense", "stablelm"),
    "OLMo 2": _of("dense", "olmo2"),
    "OLMo 3": _of("windows in some layers", "olmo3", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "StarCoder 2": _of("window", "starcoder2", sliding_window=WINDOW),
    "GLM-4": _of("fused gate_up", "glm4", head_dim=16),
    "Nemotron": _of("dense", "nemotron", head_dim=16),
    "EXAONE 4": _of(
        "windows in some layers", "exaone4", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "Seed-OSS": _of("dense", "seed_oss", head_dim=16),
    "Mixtral": _of("experts", "mixtral", _EXPERTS),
    "Qwen2-MoE": _of("experts, shared expert", "qwen2_moe", _EXPERTS, shared_expert_intermediate_size=64),
    "Qwen3-MoE": _of("experts", "qwen3_moe", _EXPERTS, head_dim=16),
    "OLMoE": _of("experts", "olmoe", _EXPERTS),
    "gpt-oss": _of(
        "experts, windows, sinks",
        "gpt_oss",
        _EXPERTS,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Granite MoE": _of("experts", "granitemoe", _EXPERTS),
    "DeepSeek-V2": _of("experts, latent attention", "deepseek_v2", _EXPERTS, _MLA),
    "DeepSeek-V3": _of("experts, latent attention", "deepseek_v3", _EXPERTS, _MLA),
    "Phi-3.5-MoE": _of("experts", "phimoe", _EXPERTS, sliding_window=None),
    "Llama 4 (text)": _of(
        "experts, chunks",
        "llama4_text",
        _EXPERTS,
        head_dim=16,
        attention_chunk_size=WINDOW,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "Qwen3.5": _of("hybrid", "qwen3_5_text", _GATED, _LINEAR),
    "Qwen3.5 (vision)": Family("qwen3_5", "vision-language wrapper, hybrid"),
    "Qwen3-Next": _of("hybrid, experts", "qwen3_next", _EXPERTS, _LINEAR, shared_expert_intermediate_size=64),
    "Granite 4 hybrid": _of(
        "hybrid",
        "granitemoehybrid",
        _GATED,
        _MAMBA2,
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        position_embedding_type="nope",
    ),
    "Granite 4 hybrid, experts": _of(
        "hybrid, experts",
        "granitemoehybrid",
        _GATED,
        _MAMBA2,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    ),
    "LFM2": _of("hybrid (convolutions)", "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "Falcon-H1": _of("hybrid", "falcon_h1", _GATED, _MAMBA2),
    "Mamba": _of("state space", "mamba", _MAMBA),
    "Falcon-Mamba": _of("state space", "falcon_mamba", _MAMBA),
    "Mamba2": _of("state space", "mamba2", _MAMBA, num_heads=4, head_dim=32, n_groups=1, expand=2, chunk_size=16),
    "Bamba": _of("hybrid", "bamba", _GATED, _MAMBA2, attn_layer_indices=[1]),
    "Nemotron-H": _of(
        "hybrid",
        "nemotron_h",
        _GATED,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
        head_dim=16,
    ),
    "Zamba2": _of(
        "hybrid, shared layers",
        "zamba2",
        {**_GATED, "num_key_value_heads": 4},
        mamba_d_state=16,
        mamba_headdim=32,
        mamba_ngroups=1,
        n_mamba_heads=4,
        chunk_size=16,
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1,
        attention_head_dim=32,
        attention_hidden_size=128,
    ),
    "Jamba": _of(
        "hybrid, experts",
        "jamba",
        _EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
    ),
    "RecurrentGemma": _of(
        "hybrid",
        "recurrent_gemma",
        _GATED,
        block_types=["recurrent", "attention"],
        lru_width=64,
        attention_window_size=WINDOW,
        num_attention_heads=4,
    ),
    "RWKV": _of(
        "state space",
        "rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 256,
            "attention_hidden_size": 64,
            "eos_token_id": 257,
            "bos_token_id": None,
        },
    ),
}


def _config(family: Family) -> Any:
    if family.type == "gemma3":
        text = {**_GATED, "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=260,
            boi_token_index=261,
            eoi_token_index=262,
            eos_token_id=257,
        )
    if family.type == "qwen3_5":
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        }
        return transformers.Qwen3_5Config(
            text_config={**_GATED, **_LINEAR},
            vision_config=vision,
            image_token_id=260,
            video_token_id=261,
            vision_start_token_id=262,
            vision_end_token_id=263,
        )
    return AutoConfig.for_model(family.type, **family.config)


def make_base(where: Path, name: str, *, dtype: torch.dtype = torch.float32, larger: float = 3.0) -> Path:
    """Writes a base of a family, random weights of seed 0, once.

    Args:
        larger: weights are multiplied by this: random ones of usual size hardly mix tokens at all.
    """
    if where.is_dir():
        return where
    family = FAMILIES[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = _config(family)
        made = AutoModelForCausalLM.from_config(config)
        if family.type == "qwen3_5":
            made = transformers.Qwen3_5ForConditionalGeneration(config)
        for key, weight in made.named_parameters():
            if weight.ndim > 1 and "embed" not in key and "conv" not in key:
                weight.data.mul_(larger)
    made.to(dtype).save_pretrained(where)
    _byte_tokenizer().save_pretrained(where)
    return where
