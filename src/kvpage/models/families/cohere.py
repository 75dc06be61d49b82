"""Cohere (Command R): attention and MLP side by side behind one layer norm, rope of neighbouring pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvpage.api.model import AttentionSpec, LayerSpec, MLPSpec, ModelDefinition, NormSpec, QKNormSpec
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import context_length, read_activation, read_heads, read_rope, weight_map

DEFAULTS: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[2], max_model_len=max_model_len, interleaved=True)
    bias = cfg.get(bool, "attention_bias", False)
    normed = QKNormSpec(norm=cohere_norm(cfg), over="each_head")
    attention = attention_spec(
        heads,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=normed if cfg.get(bool, "use_qk_norm", False) else None,
    )
    return cohere_like(
        cfg,
        family="cohere",
        attention=[attention] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
    )


def cohere_like(
    cfg: HFConfig, *, family: str, attention: Sequence[AttentionSpec], max_position: int
) -> ModelDefinition:
    """A model of Cohere's layout around ``attention``, which has one entry a layer."""
    norm = cohere_norm(cfg)
    mlp = MLPSpec(intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg))
    layers = [
        LayerSpec(mixer=mixer, ffn=mlp, mixer_norm_before=norm, ffn_norm_before=None, residual="parallel")
        for mixer in attention
    ]
    spec = decoder_spec(cfg, family, layers, max_position=max_position, final_norm=norm)
    spec = replace(spec, head=replace(spec.head, scale=cfg.get(float, "logit_scale")))
    return ModelDefinition(spec=spec, weights=weight_map(spec))


def cohere_norm(cfg: HFConfig) -> NormSpec:
    """The layer norm of every Cohere, which has no bias."""
    return NormSpec(kind="layer", eps=cfg.get(float, "layer_norm_eps"))
