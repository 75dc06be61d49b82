"""Phi-1, Phi-1.5 and Phi-2: one layer norm before attention and MLP, which run in parallel; partial rope."""

from __future__ import annotations

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec, QKNormSpec
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import (
    HF_NAMES,
    context_length,
    read_activation,
    read_heads,
    read_rope,
    weight_map,
)

DEFAULTS = {
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
NAMES = {
    **HF_NAMES,
    "final_norm": "model.final_layernorm",
    "attention.out": "self_attn.dense",
    "attention.q_norm": "self_attn.q_layernorm",
    "attention.k_norm": "self_attn.k_layernorm",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[-1], max_model_len=max_model_len, partial=True)
    norm = NormSpec(kind="layer", eps=cfg.get(float, "layer_norm_eps"), bias=True)
    qk_norm = QKNormSpec(norm=norm) if cfg.get(bool, "qk_layernorm", False) else None
    ffn = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"),
        activation=read_activation(cfg),
        gated=False,
        bias=True,
    )
    layer = LayerSpec(
        mixer=attention_spec(heads, rope=rope, qkv_bias=True, out_bias=True, qk_norm=qk_norm),
        ffn=ffn,
        mixer_norm_before=norm,
        ffn_norm_before=None,
        residual="parallel",
    )
    spec = decoder_spec(
        cfg,
        "phi",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
        head_bias=True,
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec, NAMES))
