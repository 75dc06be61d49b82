"""Mistral: Llama's layout, with a sliding window in every layer or in none."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig

DEFAULT_WINDOW = 4096
DEFAULT_KV_HEADS = 8


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``sliding_window`` null means none, absent means 4,096 as in transformers.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    stated = "sliding_window" not in cfg or cfg.get(int, "sliding_window", None) is not None
    window = cfg.count("sliding_window", DEFAULT_WINDOW) if stated else None
    return llama_like(
        cfg,
        family="mistral",
        max_model_len=max_model_len,
        windows=(window,) * cfg.num_layers,
        kv_heads=None if "num_key_value_heads" in cfg else DEFAULT_KV_HEADS,
    )
