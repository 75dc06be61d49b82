"""DeepSeek-V3 and R1: V2's layout; experts are scored by sigmoid, and chosen by score plus a learned correction."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.model import ModelDefinition
from kvpage.models.experts import read_groups
from kvpage.models.families.deepseek_v2 import DEFAULTS as V2_DEFAULTS
from kvpage.models.families.deepseek_v2 import deepseek, read_deepseek_moe
from kvpage.models.hf_config import HFConfig

DEFAULTS = {
    **V2_DEFAULTS,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; the layers that predict further tokens are left out.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed({"n_routed_experts": "num_local_experts"}).with_defaults(DEFAULTS)
    moe = replace(
        read_deepseek_moe(cfg),
        score="sigmoid",
        renormalise=cfg.get(bool, "norm_topk_prob", True),
        correction=True,
        groups=read_groups(cfg, score="best_two"),
        scale=cfg.get(float, "routed_scaling_factor", 2.5),
    )
    return deepseek(
        cfg,
        "deepseek_v3",
        moe,
        first_moe=cfg.get(int, "first_k_dense_replace", 3),
        mlp_bias=False,
        interleaved=cfg.get(bool, "rope_interleave", True),
        max_model_len=max_model_len,
    )
