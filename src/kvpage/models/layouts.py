"""Parts from which a family puts its spec together: attention, layers that are all alike, the whole decoder."""

from __future__ import annotations

from collections.abc import Sequence

from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
)
from kvpage.models.hf_config import HFConfig
from kvpage.models.translation import place_in_groups


def attention_spec(
    heads: tuple[int, int, int],
    *,
    rope: RopeSpec | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: QKNormSpec | None = None,
) -> AttentionSpec:
    """Attention of ``heads`` (query heads, KV heads, elements a head), scaled by 1 / sqrt(elements)."""
    num_heads, num_kv_heads, head_dim = heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        kv_group=0,
        kv_index=0,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        rope=rope,
    )


def window_of_all_layers(cfg: HFConfig) -> int | None:
    """``sliding_window`` of a family that has it in every layer; null or absent means none."""
    return None if cfg.get(int, "sliding_window", None) is None else cfg.count("sliding_window")


def decoder_spec(
    cfg: HFConfig,
    family: str,
    layers: Sequence[LayerSpec],
    *,
    max_position: int,
    final_norm: NormSpec,
    head_bias: bool = False,
    embedding: EmbeddingSpec | None = None,
) -> DecoderSpec:
    """The spec of ``layers``, placed in KV groups; sizes and ``tie_word_embeddings`` as ``cfg`` has them."""
    placed, groups = place_in_groups(layers)
    return DecoderSpec(
        family=family,
        vocab_size=cfg.count("vocab_size"),
        hidden_size=cfg.count("hidden_size"),
        max_position=max_position,
        embedding=embedding or EmbeddingSpec(),
        layers=placed,
        final_norm=final_norm,
        head=HeadSpec(tied=cfg.get(bool, "tie_word_embeddings", False), bias=head_bias),
        kv_groups=groups,
    )
