"""The models that parity is proved on: architectures and odd configurations of every family.

The token parity tests run each of them, and the table in docs/models.md is made from this list and the registry.
A new family adds its cases here; ``kvpage``'s registry says which family an architecture belongs to.
"""

from __future__ import annotations

from typing import Any

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.4, 2.0, 3.0, 4.5, 7.0],
}  # fmt: skip
LONGROPE_16 = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.2 * i for i in range(8)],
    "long_factor": [1.5 + 1.7 * i for i in range(8)],
}  # fmt: skip
"""For heads of 16 elements."""

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, one KV head, tied, biases": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, no grouping, odd head dim": ("LlamaForCausalLM", {"num_key_value_heads": 4, "head_dim": 24}),
    "llama, linear rope": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama, llama3 rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama, yarn rope": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "llama, dynamic rope": ("LlamaForCausalLM", {"rope_parameters": DYNAMIC}),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 37}),
    "mistral, no window": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2, window on some layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "deepseek-v2, groups": (
        "DeepseekV2ForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
        },
    ),
    "deepseek-v3, yarn": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "q_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 24,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 2,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "mixtral, window": ("MixtralForCausalLM", {"num_local_experts": 5, "sliding_window": 37}),
    "qwen2-moe, windows, every second layer sparse": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "qwen3-moe, first layer plain": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 32,
            "mlp_only_layers": [0],
            "num_hidden_layers": 2,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2, scaled by layer, own inner size": (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 90, "num_attention_heads": 2},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {"hidden_act": "gelu_fast"}),
    "gpt-neox, one after the other, half turned, tied": (
        "GPTNeoXForCausalLM",
        {
            "use_parallel_residual": False,
            "rotary_pct": 0.5,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "opt": ("OPTForCausalLM", {"ffn_dim": 100, "init_std": 0.15}),
    "phi": ("PhiForCausalLM", {"partial_rotary_factor": 0.4, "qk_layernorm": True}),
    "phi3, window": ("Phi3ForCausalLM", {"sliding_window": 29}),
    "phi3, partial longrope, tied": (
        "Phi3ForCausalLM",
        {
            "partial_rotary_factor": 0.75,
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 512,
        },
    ),
    "phi3, longrope crossed while generating": (
        "Phi3ForCausalLM",
        {"rope_parameters": LONGROPE_16, "sliding_window": 90, "original_max_position_embeddings": 64},
    ),
    "stablelm": ("StableLmForCausalLM", {"use_qkv_bias": True}),
    "stablelm, parallel": ("StableLmForCausalLM", {"use_parallel_residual": True, "num_key_value_heads": 1}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "starcoder2, window, no biases": ("Starcoder2ForCausalLM", {"use_bias": False, "sliding_window": 41}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2, windows, soft caps": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 24,
            "sliding_window": 19,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 9.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3, windows, two ropes": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 24,
            "sliding_window": 23,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 80000.0, "factor": 4.0},
            },
        },
    ),
    "cohere, norm on q and k": ("CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2, windows with rope, full layers without": (
        "Cohere2ForCausalLM",
        {
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"num_key_value_heads": 4, "attention_bias": True}),
    "olmo3, windows, yarn in full layers": (
        "Olmo3ForCausalLM",
        {
            "sliding_window": 21,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
                "full_attention": YARN,
            },
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.45,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3, layers without rope, windows": (
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 18},
    ),
}

FALLBACK_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone4, windows, no rope in full layers": (
        "Exaone4ForCausalLM",
        {"sliding_window": 19, "layer_types": WINDOWS},
    ),
    "glm4, norms on both sides": ("Glm4ForCausalLM", {"head_dim": 16}),
    "gpt-oss, sinks, windows, experts": (
        "GptOssForCausalLM",
        {
            "sliding_window": 13,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": WINDOWS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granitemoe, multipliers": (
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "logits_scaling": 3.0,
            "attention_multiplier": 0.2,
        },
    ),
    "seed-oss": ("SeedOssForCausalLM", {"head_dim": 24}),
    "vaultgemma, softcaps": (
        "VaultGemmaForCausalLM",
        {"head_dim": 16, "sliding_window": 11, "layer_types": WINDOWS},
    ),
    "llama, dynamic rope": ("LlamaForCausalLM", {"rope_parameters": DYNAMIC}),
}
"""Architectures that run through transformers' own code; of those with a family, by ``model_impl``."""
