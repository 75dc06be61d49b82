"""Phi-3, Phi-3.5 and Phi-4 (mini): Llama's layout with fused projections, partial rope, longrope and a window."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import AttentionSpec, ModelDefinition, WeightMap
from kvpage.models.families.llama import llama_like
from kvpage.models.fused_weights import one_after_another, qkv_outputs
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import window_of_all_layers
from kvpage.models.translation import (
    HF_NAMES,
    OLD_ROPE_NAMES,
    read_heads,
    read_rope,
    weight_map,
)

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
ROPE_NAMES = {**OLD_ROPE_NAMES, "yarn": "longrope"}
NAMES = {
    **HF_NAMES,
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; each sequence takes the long factors of longrope where it is beyond the original context.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    _, _, head_dim = read_heads(cfg)
    rope = read_rope(cfg, head_dim, max_model_len=max_model_len, partial=True, old_names=ROPE_NAMES)
    windows = (window_of_all_layers(cfg),) * cfg.num_layers
    spec = llama_like(cfg, family="phi3", max_model_len=max_model_len, windows=windows, rope=rope).spec
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, AttentionSpec)
    inner = cfg.count("intermediate_size")
    weights = one_after_another(weight_map(spec, NAMES), qkv_outputs(mixer))
    weights = one_after_another(weights, {"gate": inner, "up": inner})
    return ModelDefinition(spec=spec, weights=_or_taken_apart(weights, weight_map(spec, HF_NAMES)))


def _or_taken_apart(weights: WeightMap, apart: WeightMap) -> WeightMap:
    """``weights``, or those of ``apart``: gptqmodel takes gate_up_proj apart before it quantizes."""
    return {
        name: ref if ref.name == apart[name].name else replace(ref, otherwise=apart[name])
        for name, ref in weights.items()
    }
