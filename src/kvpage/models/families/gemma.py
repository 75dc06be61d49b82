"""Gemma: Llama's layout with norms that scale by 1 + weight and an embedding scaled by sqrt(hidden size)."""

from __future__ import annotations

from typing import Any

from kvpage.api.model import EmbeddingSpec, LayerSpec, MLPSpec, ModelDefinition, NormSpec
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import attention_spec, decoder_spec
from kvpage.models.translation import context_length, read_activation, read_heads, read_rope, weight_map

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    if cfg.get(str, "hidden_act", None) == "gelu":  # the first release wrote this and meant the approximation
        cfg = cfg.with_values(hidden_act="gelu_pytorch_tanh")
    refuse_bidirectional(cfg)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[2], max_model_len=max_model_len)
    bias = cfg.get(bool, "attention_bias", False)
    norm = gemma_norm(cfg)
    layer = LayerSpec(
        mixer=attention_spec(heads, rope=rope, qkv_bias=bias, out_bias=bias),
        ffn=MLPSpec(intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg)),
        mixer_norm_before=norm,
        ffn_norm_before=norm,
    )
    spec = decoder_spec(
        cfg,
        "gemma",
        [layer] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
        final_norm=norm,
        embedding=gemma_embedding(cfg),
    )
    return ModelDefinition(spec=spec, weights=weight_map(spec))


def gemma_norm(cfg: HFConfig) -> NormSpec:
    """The norm of every Gemma."""
    return NormSpec(kind="rms1p", eps=cfg.get(float, "rms_norm_eps", 1e-6))


def gemma_embedding(cfg: HFConfig) -> EmbeddingSpec:
    """The embedding of every Gemma."""
    return EmbeddingSpec(scale=cfg.count("hidden_size") ** 0.5)


def refuse_bidirectional(cfg: HFConfig) -> None:
    """Gemmas made into encoders (EmbeddingGemma) attend to later tokens, which a decoder cannot."""
    if cfg.get(bool, "use_bidirectional_attention", False):
        raise CheckpointError(
            f"{cfg.source}: key 'use_bidirectional_attention' is true; kvpage runs causal attention only (false)"
        )
