"""OLMo 2: norms after attention and MLP instead of before, and over all heads of q and of k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvpage.api.model import LayerSpec, MLPSpec, ModelDefinition, NormSpec, QKNormSpec, RopeSpec
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

DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
NAMES = {
    **HF_NAMES,
    "mixer_norm_after": "post_attention_layernorm",
    "ffn_norm_after": "post_feedforward_layernorm",
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    rope = read_rope(cfg, read_heads(cfg)[2], max_model_len=max_model_len)
    return olmo2_like(
        cfg,
        family="olmo2",
        windows=[None] * cfg.num_layers,
        ropes=[rope] * cfg.num_layers,
        max_position=context_length(cfg, rope, max_model_len),
    )


def olmo2_like(
    cfg: HFConfig,
    *,
    family: str,
    windows: Sequence[int | None],
    ropes: Sequence[RopeSpec],
    max_position: int,
) -> ModelDefinition:
    """A model of OLMo 2's layout; ``windows`` and ``ropes`` have one entry a layer."""
    bias = cfg.get(bool, "attention_bias", False)
    norm = NormSpec(kind="rms32", eps=cfg.get(float, "rms_norm_eps"))
    attention = attention_spec(
        read_heads(cfg), qkv_bias=bias, out_bias=bias, qk_norm=QKNormSpec(norm=norm, over="all")
    )
    layer = LayerSpec(
        mixer=attention,
        ffn=MLPSpec(intermediate_size=cfg.count("intermediate_size"), activation=read_activation(cfg)),
        mixer_norm_before=None,
        mixer_norm_after=norm,
        ffn_norm_before=None,
        ffn_norm_after=norm,
    )
    layers = [
        replace(layer, mixer=replace(attention, window=window, rope=rope))
        for window, rope in zip(windows, ropes, strict=True)
    ]
    spec = decoder_spec(cfg, family, layers, max_position=max_position, final_norm=norm)
    return ModelDefinition(spec=spec, weights=weight_map(spec, NAMES))
