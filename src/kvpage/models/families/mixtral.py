"""Mixtral: Mistral's layout with experts in every layer."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.models.experts import read_moe, with_experts
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig
from kvpage.models.layouts import window_of_all_layers

DEFAULTS = {
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; the router's weights always sum to 1.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.renamed({"num_local_experts": "num_experts"}).with_defaults(DEFAULTS)
    plain = llama_like(
        cfg,
        family="mixtral",
        max_model_len=max_model_len,
        windows=(window_of_all_layers(cfg),) * cfg.num_layers,
    )
    moe = read_moe(cfg, experts="num_local_experts", intermediate_size="intermediate_size", renormalise=True)
    return with_experts(
        plain.spec,
        [moe] * cfg.num_layers,
        block="block_sparse_moe",
        parts={"gate": "w1", "up": "w3", "down": "w2"},
    )
