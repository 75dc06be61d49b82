"""OLMoE: Llama's layout with experts in every layer, and one norm over all heads of q, one over all of k."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import AttentionSpec, LayerSpec, ModelDefinition, QKNormSpec
from kvpage.errors import CheckpointError
from kvpage.models.experts import read_moe, with_experts
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig

DEFAULTS = {"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed({"num_experts": "num_local_experts"}).with_defaults(DEFAULTS)
    clip = cfg.get(float, "clip_qkv", None)
    if clip is not None:
        raise CheckpointError(f"{cfg.source}: clip_qkv {clip} is not supported, only null")
    bias = cfg.get(bool, "attention_bias", False)
    plain = llama_like(
        cfg,
        family="olmoe",
        max_model_len=max_model_len,
        windows=(None,) * cfg.num_layers,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    spec = replace(plain.spec, layers=tuple(_norm_over_all(layer) for layer in plain.spec.layers))
    moe = read_moe(
        cfg, intermediate_size="intermediate_size", renormalise=cfg.get(bool, "norm_topk_prob", False)
    )
    return with_experts(spec, [moe] * cfg.num_layers)


def _norm_over_all(layer: LayerSpec) -> LayerSpec:
    mixer = layer.mixer
    if not isinstance(mixer, AttentionSpec) or mixer.qk_norm is None:
        raise TypeError("OLMoE's layers have attention with a norm of q and k")
    norm = QKNormSpec(norm=mixer.qk_norm.norm, over="all")
    return replace(layer, mixer=replace(mixer, qk_norm=norm))
