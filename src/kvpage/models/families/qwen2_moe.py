"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; some layers have experts, and a gated expert that all tokens share."""

from __future__ import annotations

from kvpage.api.model import MLPSpec, ModelDefinition
from kvpage.models.experts import has_experts, read_moe, with_experts
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import FULL, SLIDING, read_layer_types, read_windows
from kvpage.models.translation import read_activation

DEFAULTS = {
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 4096,
}
DEFAULT_WINDOW_END = 28


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    plain = llama_like(
        cfg,
        family="qwen2_moe",
        max_model_len=max_model_len,
        windows=_windows(cfg),
        qkv_bias=cfg.get(bool, "qkv_bias", True),
    )
    sparse = has_experts(cfg)
    if not any(sparse):
        return plain
    moe = read_moe(
        cfg,
        renormalise=cfg.get(bool, "norm_topk_prob", False),
        shared=MLPSpec(
            intermediate_size=cfg.count("shared_expert_intermediate_size"), activation=read_activation(cfg)
        ),
    )
    return with_experts(plain.spec, [moe if here else None for here in sparse])


def _windows(cfg: HFConfig) -> tuple[int | None, ...]:
    """Each layer's window: by ``layer_types``, else every second layer's below ``max_window_layers``."""
    used = cfg.get(bool, "use_sliding_window", False)
    if not used:
        cfg = cfg.with_values(sliding_window=None)
    slide = range(0, cfg.get(int, "max_window_layers", DEFAULT_WINDOW_END), 2) if used else ()
    otherwise = [SLIDING if index in slide else FULL for index in range(cfg.num_layers)]
    return read_windows(cfg, read_layer_types(cfg, otherwise))
