"""Tiny models for the suite of decoder backends: specs that together use what a DecoderSpec can say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
)
from kvpage.api.parameters import Parameter, parameters
from kvpage.api.quant import ChannelInt8, Dense, GroupedInt, WeightForm

VOCAB, HIDDEN, LAYERS, CONTEXT = 61, 32, 3, 128
NOTHING: Mapping[str, Any] = MappingProxyType({})
RMS = NormSpec(kind="rms", eps=1e-5)
LAYER_NORM = NormSpec(kind="layer", eps=1e-5, bias=True)
Packing: TypeAlias = Literal["plain", "int8", "int4"]
GROUP = 32
"""Inputs that share a scale of packed weights."""


def sample_specs(head_dim: int) -> dict[str, DecoderSpec]:
    """Name -> spec, with heads of ``head_dim`` elements."""
    spec = partial(_spec, head_dim)
    gated = MLPSpec(intermediate_size=48, activation="silu")
    experts = MoESpec(expert=MLPSpec(intermediate_size=24, activation="silu"), num_experts=5, top_k=2)
    shared = MoESpec(
        expert=MLPSpec(intermediate_size=24, activation="silu"),
        num_experts=4,
        top_k=2,
        renormalise=False,
        shared=MLPSpec(intermediate_size=40, activation="silu"),
        shared_gate=True,
    )
    gelu = MLPSpec(intermediate_size=64, activation="gelu_tanh", gated=False, bias=True)
    gemma_like = NormSpec(kind="rms1p", eps=1e-6)
    return {
        "llama": spec(gated),
        "biased-qk-norm": spec(
            gated, attention={"qkv_bias": True, "out_bias": True, "qk_norm": QKNormSpec(norm=RMS)}, tied=True
        ),
        "mixed-window": spec(
            MLPSpec(intermediate_size=48, activation="gelu_tanh"),
            norm=gemma_like,
            around=True,
            windows=(7, 7, None),
            attention={"softcap": 20.0},
            embedding=EmbeddingSpec(scale=math.sqrt(HIDDEN)),
            head=HeadSpec(tied=True, softcap=15.0),
        ),
        "sinks": spec(gated, windows=(5, None, 5), attention={"sinks": True}),
        "experts": spec(experts),
        "shared-expert": spec(shared),
        "parallel": spec(
            gelu,
            norm=LAYER_NORM,
            parallel=True,
            attention={"qkv_bias": True, "out_bias": True},
            rope={"rotary_dim": head_dim // 2, "interleaved": True},
        ),
        "learned-positions": spec(
            MLPSpec(intermediate_size=64, activation="relu", gated=False, bias=True),
            norm=LAYER_NORM,
            rope=None,
            attention={"qkv_bias": True, "out_bias": True},
            embedding=EmbeddingSpec(positions=CONTEXT, position_offset=2),
            head=HeadSpec(tied=True),
        ),
        "multipliers": spec(
            gated, multiplier=0.3, embedding=EmbeddingSpec(scale=5.0), head=HeadSpec(tied=False, bias=True, scale=0.25)
        ),
    }  # fmt: skip


def sample_weights(
    spec: DecoderSpec, dtype: torch.dtype, *, merged: bool, packing: Packing = "plain"
) -> dict[str, WeightForm]:
    """Random weights; ``merged``: parts of one block (q, k, v) lie one after another, as the loader puts them.

    ``packing``: of linear layers (but routers and gates of shared experts) and the token embedding.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    weights: dict[str, WeightForm] = {}
    for _, members in groupby(parameters(spec), key=lambda parameter: parameter.block):
        block = list(members)
        rows = sum(part.shape[0] for part in block)
        whole = torch.randn(rows, *block[0].shape[1:], generator=generator, device="cpu") * 0.2
        if block[0].kind == "norm" and not _adds_one(spec, block[0].name):
            whole = 1 + whole
        form = _packed(whole, packing) if _may_be_packed(block[0]) else None
        form = Dense(whole.to(dtype)) if form is None else form
        start = 0
        for part in block:
            stop = start + part.shape[0]
            weights[part.name] = form.map(partial(_rows, start=start, stop=stop, copied=not merged))
            start = stop
    return weights


def _rows(tensor: torch.Tensor, *, start: int, stop: int, copied: bool) -> torch.Tensor:
    rows = tensor[start:stop]
    return rows.clone() if copied else rows


def _may_be_packed(parameter: Parameter) -> bool:
    name = parameter.name
    small = ".router." in name or ".shared_gate." in name
    return name == "embed.weight" or (parameter.kind == "linear" and not small)


def _packed(weight: torch.Tensor, packing: Packing) -> WeightForm | None:
    """float32 [out, in] in 8 bits, or in 4 with groups of ``GROUP`` inputs; in 8 where that does not divide them."""
    if packing == "plain":
        return None
    if packing == "int8" or weight.shape[1] % GROUP:
        scales = weight.abs().amax(1) / 127
        codes = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        return ChannelInt8(codes=codes, scales=scales)
    groups = weight.unflatten(1, (-1, GROUP))
    steps = (groups.abs().amax(2) / 7).bfloat16()
    q = (groups / steps.float().unsqueeze(2)).round().clamp(-8, 7).add(8).flatten(1).to(torch.uint8)
    return GroupedInt(codes=q[:, 0::2] | q[:, 1::2] << 4, scales=steps, group=GROUP)


def _adds_one(spec: DecoderSpec, name: str) -> bool:
    return spec.final_norm.kind == "rms1p" and "q_norm" not in name and "k_norm" not in name


def _spec(
    head_dim: int,
    ffn: MLPSpec | MoESpec,
    *,
    norm: NormSpec = RMS,
    around: bool = False,
    parallel: bool = False,
    multiplier: float = 1.0,
    windows: tuple[int | None, ...] = (None,) * LAYERS,
    attention: Mapping[str, Any] = NOTHING,
    rope: Mapping[str, Any] | None = NOTHING,
    embedding: EmbeddingSpec | None = None,
    head: HeadSpec | None = None,
    tied: bool = False,
) -> DecoderSpec:
    """Three layers of 4 heads on 2 KV heads; layers with one window share a KV group."""
    kinds = list(dict.fromkeys(windows))
    layers = []
    for index, window in enumerate(windows):
        values: dict[str, Any] = {"kind": "default", "theta": 10000.0, "rotary_dim": head_dim, **(rope or {})}
        mixer = AttentionSpec(
            num_heads=4,
            num_kv_heads=2,
            head_dim=head_dim,
            v_head_dim=head_dim,
            scale=head_dim**-0.5,
            kv_group=kinds.index(window),
            kv_index=windows[:index].count(window),
            window=window,
            rope=None if rope is None else RopeSpec(**values),
            **attention,
        )
        layers.append(
            LayerSpec(
                mixer=mixer,
                ffn=ffn,
                mixer_norm_before=norm,
                ffn_norm_before=None if parallel else norm,
                mixer_norm_after=norm if around else None,
                ffn_norm_after=norm if around else None,
                residual="parallel" if parallel else "sequential",
                residual_multiplier=multiplier,
            )
        )
    groups = tuple(
        KVGroupSpec(
            kind="full" if window is None else "window",
            layers=tuple(i for i, other in enumerate(windows) if other == window),
            num_kv_heads=2,
            head_dim=head_dim,
            v_head_dim=head_dim,
            window=window,
        )
        for window in kinds
    )
    return DecoderSpec(
        family="conformance",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_position=CONTEXT,
        embedding=embedding or EmbeddingSpec(),
        layers=tuple(layers),
        final_norm=norm,
        head=head or HeadSpec(tied=tied),
        kv_groups=groups,
    )
