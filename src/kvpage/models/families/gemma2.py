"""Gemma 2: norms before and after each part, soft-capped scores and logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvpage.api.model import AttentionSpec, LayerSpec, MLPSpec, ModelDefinition
from kvpage.errors import CheckpointError
from kvpage.models.families.gemma import gemma_embedding, gemma_norm, refuse_bidirectional
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import every_nth_full, read_layer_types, read_windows
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import (
    HF_NAMES,
    context_length,
    read_activation,
    read_heads,
    read_rope,
    weight_map,
)

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
NAMES = {
    **HF_NAMES,
    "mixer_norm_after": "post_attention_layernorm",
    "ffn_norm_before": "pre_feedforward_layernorm",
    "ffn_norm_after": "post_feedforward_layernorm",
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
    attention = replace(
        attention_spec(heads, rope=rope, qkv_bias=bias, out_bias=bias),
        scale=query_scale(cfg),
        softcap=read_softcap(cfg, "attn_logit_softcapping"),
    )
    windows = read_windows(cfg, read_layer_types(cfg, every_nth_full(cfg, 2)))
    return gemma2_like(
        cfg,
        family="gemma2",
        attention=[replace(attention, window=window) for window in windows],
        max_position=context_length(cfg, rope, max_model_len),
    )


def gemma2_like(
    cfg: HFConfig, *, family: str, attention: Sequence[AttentionSpec], max_position: int
) -> ModelDefinition:
    """A model of Gemma 2's layout around ``attention``, which has one entry a layer."""
    refuse_bidirectional(cfg)
    norm = gemma_norm(cfg)
    mlp = MLPSpec(
        intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg, "hidden_activation")
    )
    layers = [
        LayerSpec(
            mixer=mixer,
            ffn=mlp,
            mixer_norm_before=norm,
            mixer_norm_after=norm,
            ffn_norm_before=norm,
            ffn_norm_after=norm,
        )
        for mixer in attention
    ]
    spec = decoder_spec(
        cfg, family, layers, max_position=max_position, final_norm=norm, embedding=gemma_embedding(cfg)
    )
    spec = replace(spec, head=replace(spec.head, softcap=read_softcap(cfg, "final_logit_softcapping")))
    return ModelDefinition(spec=spec, weights=weight_map(spec, NAMES))


def query_scale(cfg: HFConfig) -> float:
    """What q.k is multiplied by."""
    return float(cfg.count("query_pre_attn_scalar") ** -0.5)


def read_softcap(cfg: HFConfig, key: str) -> float | None:
    """A cap of scores or logits; null means none."""
    value = cfg.get(float, key, None)
    if value is not None and value <= 0:
        raise CheckpointError(f"{cfg.source}: key {key!r} must be above 0, or null for no cap; found {value}")
    return value
