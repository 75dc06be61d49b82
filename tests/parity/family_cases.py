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
}
