"""A small spec to build others from, for tests that need no checkpoint of a family."""

from __future__ import annotations

from dataclasses import replace

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelDefinition,
    NormSpec,
    RopeSpec,
)
from kvpage.models.translation import weight_map

HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCAB = 4, 2, 12, 48, 72, 211
RMS = NormSpec(kind="rms", eps=1e-6)
ATTENTION = AttentionSpec(
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    v_head_dim=DIM,
    scale=DIM**-0.5,
    kv_group=0,
    kv_index=0,
    rope=RopeSpec(kind="default", theta=10000.0, rotary_dim=DIM),
)
MLP = MLPSpec(intermediate_size=INNER, activation="silu")
DECODER = DecoderSpec(
    family="handwritten",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    max_position=128,
    embedding=EmbeddingSpec(),
    layers=(),
    final_norm=RMS,
    head=HeadSpec(tied=False),
    kv_groups=(
        KVGroupSpec(kind="full", layers=(0, 1, 2), num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=DIM),
    ),
)


def three_layers(mixer: AttentionSpec = ATTENTION) -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(mixer=replace(mixer, kv_index=i), ffn=MLP, mixer_norm_before=RMS, ffn_norm_before=RMS)
        for i in range(3)
    )


def named(spec: DecoderSpec) -> ModelDefinition:
    return ModelDefinition(spec=spec, weights=weight_map(spec))
