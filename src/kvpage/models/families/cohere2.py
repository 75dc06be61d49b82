"""Cohere 2 (Command R7B, Command A): Cohere's layout; layers with a window have rope, those without have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpage.api.model import ModelDefinition
from kvpage.models.families import cohere
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import every_nth_full, read_layer_types, read_windows
from kvpage.models.layouts import attention_spec
from kvpage.models.translation import context_length, read_heads, read_rope

DEFAULTS: dict[str, Any] = {**cohere.DEFAULTS, "rope_theta": 10000.0, "sliding_window": 4096}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    heads = read_heads(cfg)
    rope = read_rope(cfg, heads[2], max_model_len=max_model_len, interleaved=True)
    bias = cfg.get(bool, "attention_bias", False)
    attention = attention_spec(heads, qkv_bias=bias, out_bias=bias)
    types = read_layer_types(cfg, every_nth_full(cfg, cfg.count("sliding_window_pattern", 4)))
    return cohere.cohere_like(
        cfg,
        family="cohere2",
        attention=[
            attention if window is None else replace(attention, window=window, rope=rope)
            for window in read_windows(cfg, types)
        ],
        max_position=context_length(cfg, rope, max_model_len),
    )
