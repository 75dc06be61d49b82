"""A DecoderSpec written by hand gives the logits of families that Llama's layout cannot express.

What transformers computes is the truth; families have their parity tests beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dense_context import all_logits, decoder_from
from test_family_parity import make_model, oracle_logits, prompt

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
    WeightRef,
)
from kvpage.models.translation import HF_NAMES, weight_map

HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCAB = 4, 2, 12, 48, 72, 211
RMS = NormSpec(kind="rms", eps=1e-6)
LAYER = NormSpec(kind="layer", eps=1e-5, bias=True)
ROPE = RopeSpec(kind="default", theta=10000.0, rotary_dim=DIM)
ATTENTION = AttentionSpec(
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    v_head_dim=DIM,
    scale=DIM**-0.5,
    kv_group=0,
    kv_index=0,
    rope=ROPE,
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


def layers(mixer: AttentionSpec, ffn: MLPSpec, norm: NormSpec, **places: Any) -> tuple[LayerSpec, ...]:
    before = {"mixer_norm_before": norm, "ffn_norm_before": norm, **places}
    return tuple(LayerSpec(mixer=replace(mixer, kv_index=i), ffn=ffn, **before) for i in range(3))


def assert_parity(folder: Path, kind: str, options: dict[str, Any], definition: ModelDefinition) -> None:
    model = make_model(kind, options)
    model.save_pretrained(folder)
    tokens = prompt(30)
    torch.testing.assert_close(
        all_logits(decoder_from(folder, definition), tokens),
        oracle_logits(model, tokens),
        atol=2e-4,
        rtol=2e-4,
    )


def named(spec: DecoderSpec, names: Mapping[str, str], prefix: str = "model.layers") -> ModelDefinition:
    return ModelDefinition(spec=spec, weights=weight_map(spec, {**HF_NAMES, **names}, prefix))


def test_gpt2_learned_positions_and_transposed_fused_weights(tmp_path: Path) -> None:
    mixer = replace(ATTENTION, num_kv_heads=HEADS, rope=None, qkv_bias=True, out_bias=True)
    ffn = MLPSpec(intermediate_size=INNER, activation="gelu_tanh", gated=False, bias=True)
    spec = replace(
        DECODER,
        embedding=EmbeddingSpec(positions=128),
        layers=layers(mixer, ffn, LAYER),
        final_norm=LAYER,
        head=HeadSpec(tied=True),
    )
    names = {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "mixer_norm_before": "ln_1",
        "ffn_norm_before": "ln_2",
        "attention.q": "attn.c_attn",
        "attention.k": "attn.c_attn",
        "attention.v": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    weights = dict(named(spec, names, "transformer.h").weights)
    for name, ref in weights.items():
        part = name.split(".")[-2]
        rows = {"q": (0, HIDDEN), "k": (HIDDEN, 2 * HIDDEN), "v": (2 * HIDDEN, 3 * HIDDEN)}.get(part)
        is_matrix = name.endswith("weight") and part in ("q", "k", "v", "out", "up", "down")
        weights[name] = WeightRef(name=ref.name, rows=rows, transpose=is_matrix)
    options = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 3, "n_inner": INNER}
    model = make_model("GPT2", options, head="LMHeadModel")
    model.save_pretrained(tmp_path)
    definition = ModelDefinition(spec=spec, weights=weights)
    tokens = prompt(30)
    torch.testing.assert_close(
        all_logits(decoder_from(tmp_path, definition), tokens),
        oracle_logits(model, tokens),
        atol=2e-4,
        rtol=2e-4,
    )


def test_gpt_neox_parallel_residual_with_two_norms_partial_rope_and_heads_interleaved(tmp_path: Path) -> None:
    mixer = replace(
        ATTENTION, num_kv_heads=HEADS, qkv_bias=True, out_bias=True, rope=replace(ROPE, rotary_dim=6)
    )
    ffn = MLPSpec(intermediate_size=INNER, activation="gelu", gated=False, bias=True)
    spec = replace(DECODER, layers=layers(mixer, ffn, LAYER, residual="parallel"), final_norm=LAYER)
    names = {
        "embed": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "attention.q": "attention.query_key_value",
        "attention.k": "attention.query_key_value",
        "attention.v": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    weights = dict(named(spec, names, "gpt_neox.layers").weights)
    for name, ref in weights.items():
        place = {"q": 0, "k": 1, "v": 2}.get(name.split(".")[-2])
        if place is not None:
            weights[name] = WeightRef(name=ref.name, rows=(place * DIM, (place + 1) * DIM), every=3 * DIM)
    assert_parity(
        tmp_path,
        "GPTNeoX",
        {"rotary_pct": 0.5, "layer_norm_eps": 1e-5},
        ModelDefinition(spec=spec, weights=weights),
    )


def test_phi_head_bias_and_single_norm_parallel_block(tmp_path: Path) -> None:
    mixer = replace(ATTENTION, qkv_bias=True, out_bias=True, rope=replace(ROPE, rotary_dim=6))
    ffn = MLPSpec(intermediate_size=INNER, activation="gelu_tanh", gated=False, bias=True)
    spec = replace(
        DECODER,
        layers=layers(mixer, ffn, LAYER, ffn_norm_before=None, residual="parallel"),
        final_norm=LAYER,
        head=HeadSpec(tied=False, bias=True),
    )
    names = {
        "final_norm": "model.final_layernorm",
        "attention.out": "self_attn.dense",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }
    assert_parity(tmp_path, "Phi", {"partial_rotary_factor": 0.5}, named(spec, names))


def test_phi3_parts_of_one_tensor_and_longrope(tmp_path: Path) -> None:
    factors = tuple(1.0 + 0.3 * i for i in range(DIM // 2))
    rope = replace(
        ROPE,
        kind="longrope",
        max_position=64,
        parameters={
            "short_factor": factors,
            "long_factor": tuple(4 * f for f in factors),
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        },
    )
    spec = replace(DECODER, layers=layers(replace(ATTENTION, rope=rope), MLP, RMS))
    fused = {"attention.q": "qkv", "attention.k": "qkv", "attention.v": "qkv"}
    names = {part: f"self_attn.{name}_proj" for part, name in fused.items()}
    names |= {"mlp.gate": "mlp.gate_up_proj", "mlp.up": "mlp.gate_up_proj"}
    query, key = HEADS * DIM, KV_HEADS * DIM
    rows = {
        "q": (0, query),
        "k": (query, query + key),
        "v": (query + key, query + 2 * key),
        "gate": (0, INNER),
        "up": (INNER, 2 * INNER),
    }
    weights = {
        name: WeightRef(name=ref.name, rows=rows.get(name.split(".")[-2]))
        for name, ref in named(spec, names).weights.items()
    }
    options = {
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": list(factors),
            "long_factor": [4 * f for f in factors],
        },
    }
    assert_parity(tmp_path, "Phi3", options, ModelDefinition(spec=spec, weights=weights))
