"""Gemma 3, and the text part of its multimodal checkpoints: Gemma 2's layout with normed q and k and two ropes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpage.api.model import ModelDefinition, QKNormSpec
from kvpage.models.families.gemma import gemma_norm
from kvpage.models.families.gemma2 import gemma2_like, query_scale
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import (
    FULL,
    SLIDING,
    every_nth_full,
    read_layer_types,
    read_windows,
    with_rope_of_types,
)
from kvpage.models.layouts import attention_spec
from kvpage.models.translation import read_heads, read_rope

# The multimodal checkpoints leave out of text_config what equals these.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    thetas = {FULL: cfg.get(float, "rope_theta"), SLIDING: cfg.get(float, "rope_local_base_freq")}
    cfg = with_rope_of_types(cfg, thetas)
    heads = read_heads(cfg)
    types = read_layer_types(cfg, every_nth_full(cfg, cfg.count("sliding_window_pattern", 6)))
    ropes = {
        kind: read_rope(cfg, heads[2], max_model_len=max_model_len, layer_type=kind) for kind in set(types)
    }
    bias = cfg.get(bool, "attention_bias", False)
    norm = QKNormSpec(norm=gemma_norm(cfg))
    # transformers reads attn_logit_softcapping too, and does not use it.
    attention = replace(
        attention_spec(heads, qkv_bias=bias, out_bias=bias, qk_norm=norm), scale=query_scale(cfg)
    )
    definition = gemma2_like(
        cfg,
        family="gemma3",
        attention=[
            replace(attention, window=window, rope=ropes[kind])
            for window, kind in zip(read_windows(cfg, types), types, strict=True)
        ],
        # The context that a Gemma 3 states is that with its rope scaling.
        max_position=cfg.count("max_position_embeddings"),
    )
    return _within_multimodal(definition) if "text_config" in cfg else definition


def _within_multimodal(definition: ModelDefinition) -> ModelDefinition:
    """The text part's weights by the names they have in files, and (others) in a model of transformers 5."""
    refs = {
        name: replace(
            ref,
            name=f"language_model.{ref.name}",
            otherwise=replace(ref, name=ref.name.replace("model.", "model.language_model.", 1)),
        )
        for name, ref in definition.weights.items()
    }
    return replace(definition, weights=refs)
