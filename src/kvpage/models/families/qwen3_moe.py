"""Qwen3-MoE: Qwen3's attention; some layers have experts, none of them shared."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.models.experts import has_experts, read_moe, with_experts
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import window_of_all_layers

DEFAULTS = {
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "sliding_window": 4096,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; a window, where asked for, is in every layer.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed({"num_experts": "num_local_experts"}).with_defaults(DEFAULTS)
    window = window_of_all_layers(cfg) if cfg.get(bool, "use_sliding_window", False) else None
    bias = cfg.get(bool, "attention_bias", False)
    plain = llama_like(
        cfg,
        family="qwen3_moe",
        max_model_len=max_model_len,
        windows=(window,) * cfg.num_layers,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    sparse = has_experts(cfg)
    if not any(sparse):
        return plain
    moe = read_moe(cfg, renormalise=cfg.get(bool, "norm_topk_prob", False))
    return with_experts(plain.spec, [moe if here else None for here in sparse])
