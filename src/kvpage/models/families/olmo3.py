"""OLMo 3: OLMo 2's layout, with a window in three of four layers, whose rope is never scaled."""

from __future__ import annotations

from typing import Any

from kvpage.api.model import ModelDefinition
from kvpage.models.families import olmo2
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import (
    FULL,
    SLIDING,
    every_nth_full,
    read_layer_types,
    read_windows,
    with_rope_of_types,
)
from kvpage.models.translation import context_length, read_heads, read_rope

THETA = 500000.0
DEFAULTS: dict[str, Any] = {**olmo2.DEFAULTS, "sliding_window": 4096, "rope_theta": THETA}


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model; ``max_model_len`` only fixes the frequencies of dynamic rope.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    cfg = cfg.with_defaults(DEFAULTS)
    # As transformers 5 has it, rope_theta beside rope_parameters is that of full attention only.
    cfg = with_rope_of_types(cfg, {FULL: cfg.get(float, "rope_theta"), SLIDING: THETA})
    types = read_layer_types(cfg, every_nth_full(cfg, 4))
    head_dim = read_heads(cfg)[2]
    ropes = {
        kind: read_rope(cfg, head_dim, max_model_len=max_model_len, layer_type=kind)
        for kind in (FULL, SLIDING)
    }
    return olmo2.olmo2_like(
        cfg,
        family="olmo3",
        windows=read_windows(cfg, types),
        ropes=[ropes[kind] for kind in types],
        max_position=context_length(cfg, ropes[FULL], max_model_len),
    )
