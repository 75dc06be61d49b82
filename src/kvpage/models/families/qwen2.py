"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v, and a window in the upper layers where asked."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig
from kvpage.models.layer_types import FULL, SLIDING, read_layer_types, read_windows

DEFAULT_WINDOW = 4096
DEFAULT_WINDOW_START = 28
DEFAULT_KV_HEADS = 32


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    return llama_like(
        cfg,
        family="qwen2",
        max_model_len=max_model_len,
        windows=layer_windows(cfg),
        qkv_bias=True,
        kv_heads=None if "num_key_value_heads" in cfg else DEFAULT_KV_HEADS,
    )


def layer_windows(cfg: HFConfig) -> tuple[int | None, ...]:
    """Each layer's window: by ``layer_types`` where given, else the layers from ``max_window_layers`` on."""
    if not cfg.get(bool, "use_sliding_window", False):
        cfg = cfg.with_values(sliding_window=None)
    cfg = cfg.with_defaults({"sliding_window": DEFAULT_WINDOW})
    start = cfg.get(int, "max_window_layers", DEFAULT_WINDOW_START)
    slides = cfg.get(int, "sliding_window", None) is not None
    otherwise = [SLIDING if slides and index >= start else FULL for index in range(cfg.num_layers)]
    return read_windows(cfg, read_layer_types(cfg, otherwise))
