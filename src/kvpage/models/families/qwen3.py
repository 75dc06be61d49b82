"""Qwen3: Llama's layout with a norm on each head of q and k, and Qwen2's windows."""

from __future__ import annotations

from kvpage.api.model import ModelDefinition
from kvpage.models.families.llama import llama_like
from kvpage.models.families.qwen2 import DEFAULT_KV_HEADS, layer_windows
from kvpage.models.hf_config import HFConfig

DEFAULT_HEAD_DIM = 128


def translate(cfg: HFConfig, *, max_model_len: int | None) -> ModelDefinition:
    """``cfg`` as a model.

    Raises:
        CheckpointError: a key is missing, of another type, or holds a value this family does not run.
    """
    bias = cfg.get(bool, "attention_bias", False)
    return llama_like(
        cfg,
        family="qwen3",
        max_model_len=max_model_len,
        windows=layer_windows(cfg),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        kv_heads=None if "num_key_value_heads" in cfg else DEFAULT_KV_HEADS,
        head_dim=None if "head_dim" in cfg else DEFAULT_HEAD_DIM,
    )
