"""Qwen2 and Qwen2.5: Llama's layout with biases on q, k and v, and a window in the upper layers where asked."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.errors import CheckpointError
from kvpage.models.families.llama import llama_like
from kvpage.models.hf_config import HFConfig

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
    count = cfg.num_layers
    used = cfg.get(bool, "use_sliding_window", False)
    stated = "sliding_window" not in cfg or cfg.get(int, "sliding_window", None) is not None
    window = cfg.count("sliding_window", DEFAULT_WINDOW) if used and stated else None
    types = cfg.get(list, "layer_types", None)
    if types is None:
        start = cfg.get(int, "max_window_layers", DEFAULT_WINDOW_START)
        return tuple(window if index >= start else None for index in range(count))
    if len(types) != count:
        raise CheckpointError(
            f"{cfg.source}: layer_types must have {count} entries (num_hidden_layers), has {len(types)}"
        )
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise CheckpointError(
            f"{cfg.source}: layer_types has {', '.join(unknown)}; kvpage has full_attention, sliding_attention"
        )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(
            f"{cfg.source}: layer_types has sliding_attention, but use_sliding_window and sliding_window give no window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
