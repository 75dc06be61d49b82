"""GGUF's names for what Hugging Face calls otherwise: types of numbers, architectures, tensors. Data only.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the converter in llama.cpp, which wrote the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN_TYPES: Mapping[int, tuple[str, str, int]] = {
    0: ("F32", "float32", 4), 1: ("F16", "float16", 2), 30: ("BF16", "bfloat16", 2), 28: ("F64", "float64", 8),
    24: ("I8", "int8", 1), 25: ("I16", "int16", 2), 26: ("I32", "int32", 4), 27: ("I64", "int64", 8),
}  # fmt: skip
"""ggml's number of a type -> (its name, torch's, bytes of an element)."""

BLOCK_TYPES: Mapping[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
"""ggml's number of a type -> (its name, weights in a block, bytes of a block)."""

OTHER_TYPES: Mapping[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that are refused by name."""

TOP: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Part of the config for Hugging Face."""

_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_FOUR_NORMS = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {**_LAYER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_EXPERTS = {
    **_LAYER,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_exps": f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")},
}
_MIXTRAL = {
    **_LAYER,
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{
        f"ffn_{part}_exps": f"block_sparse_moe.experts.{{expert}}.{name}"
        for part, name in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        name: Hugging Face's class. model_type: its model_type.
        layer: what a layer's tensors are called, "blk.3.KEY" -> "model.layers.3.VALUE"; {expert} stands in those
            that hold all experts.
        permuted: rows of q and k are in llama.cpp's order of rope, pairs side by side.
        shifted: the weights of norms have 1 added.
        partial: rope may turn a part of each head.
        keys: further keys of the config, from those after "ARCHITECTURE."; a missing one is left out.
        fixed: keys of the config that are the same in all files.
    """

    name: str
    model_type: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    permuted: bool = False
    shifted: bool = False
    partial: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="LlamaForCausalLM", model_type="llama", permuted=True, fixed=_SILU),
    "qwen2": Architecture(name="Qwen2ForCausalLM", model_type="qwen2", fixed=_SILU),
    "qwen3": Architecture(name="Qwen3ForCausalLM", model_type="qwen3", fixed=_SILU),
    "gemma": Architecture(name="GemmaForCausalLM", model_type="gemma", shifted=True, fixed=_GELU),
    "gemma2": Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        layer=_FOUR_NORMS,
        shifted=True,
        keys=_SOFTCAPS,
        fixed=_GELU,
    ),
    "gemma3": Architecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layer=_FOUR_NORMS,
        shifted=True,
        keys=_SOFTCAPS,
        fixed=_GELU,
    ),
    "phi3": Architecture(name="Phi3ForCausalLM", model_type="phi3", layer=_FUSED, partial=True, fixed=_SILU),
    "qwen2moe": Architecture(
        name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        layer=_EXPERTS,
        keys={**_EXPERT_KEYS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={**_SILU, "norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layer=_EXPERTS,
        keys=_EXPERT_KEYS,
        fixed={**_SILU, "norm_topk_prob": True},
    ),
}

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    layer=_MIXTRAL,
    permuted=True,
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    fixed={**_SILU, "sliding_window": None},
)
"""A file of architecture "llama" that states llama.expert_count."""

END_OF_TEXT = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>",
})  # fmt: skip
"""Control tokens that end a turn or a text: as in llama.cpp, whatever the file states beside them."""

SAMPLING: Mapping[str, str] = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
"""general.sampling.KEY -> generation_config.json's key."""
