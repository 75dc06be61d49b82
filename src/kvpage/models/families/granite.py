"""Granite: Llama's layout with multipliers on embedding, attention scores, branches and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpage.api.model import EmbeddingSpec, LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import context_length, read_activation, read_heads, read_rope, weight_map

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[2], max_model_len=max_model_len)
    bias = cfg.get(bool, "attention_bias", False)
    attention = attention_spec(heads, rope=rope, qkv_bias=bias, out_bias=bias)
    norm = NormSpec(kind="rms", eps=cfg.get(float, "rms_norm_eps", 1e-6))
    layer = LayerSpec(
        mixer=replace(attention, scale=cfg.get(float, "attention_multiplier")),
        ffn=MLPSpec(
            intermediate_size=cfg.count("intermediate_size"),
            activation=read_activation(cfg),
            bias=cfg.get(bool, "mlp_bias", False),
        ),
        mixer_norm_before=norm,
        ffn_norm_before=norm,
        residual_multiplier=cfg.get(float, "residual_multiplier"),
    )
    spec = decoder_spec(
        cfg,
        "granite",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
        embedding=EmbeddingSpec(scale=cfg.get(float, "embedding_multiplier")),
    )
    divisor = cfg.get(float, "logits_scaling")
    if divisor == 0:
        raise CheckpointError(f"{cfg.source}: key 'logits_scaling' is 0; logits are divided by it")
    spec = replace(spec, head=replace(spec.head, scale=1 / divisor))
    return ModelDefinition(spec=spec, weights=weight_map(spec))
