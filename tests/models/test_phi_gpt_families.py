"""Phi, StarCoder2, GPT-NeoX, GPT-2, OPT and StableLM give transformers' logits, and read its configs of both kinds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_context import all_logits, decoder_from
from safetensors.torch import load_file, save_file
from test_family_parity import make_model, oracle_logits, prompt

from kvpage.api.model import DecoderEnv, ModelDefinition
from kvpage.api.parameters import parameters
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena
from kvpage.loading.readers import DummyView, ModuleView
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.families import gpt2, gpt_neox, opt, phi, phi3, stablelm, starcoder2
from kvpage.models.hf_config import HFConfig

Translate = Callable[..., ModelDefinition]

FAMILIES: dict[str, tuple[str, Translate]] = {
    "phi3": ("Phi3", phi3.translate),
    "phi": ("Phi", phi.translate),
    "starcoder2": ("Starcoder2", starcoder2.translate),
    "gpt_neox": ("GPTNeoX", gpt_neox.translate),
    "gpt2": ("GPT2", gpt2.translate),
    "opt": ("OPT", opt.translate),
    "stablelm": ("StableLm", stablelm.translate),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CONTEXT = 128


def longrope(pairs: int) -> dict[str, Any]:
    short = [1.0 + 0.3 * i for i in range(pairs)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": [2.0 + i for i in range(pairs)]}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {}),
    ("phi3", {"sliding_window": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("phi3", {"partial_rotary_factor": 0.75, "num_key_value_heads": None, "rms_norm_eps": 1e-2}),
    ("phi3", {"rope_scaling": longrope(6), "original_max_position_embeddings": CONTEXT}),
    (
        "phi3",
        {
            "rope_scaling": longrope(4),
            "partial_rotary_factor": 0.67,
            "original_max_position_embeddings": CONTEXT,
        },
    ),
    ("phi", {}),
    ("phi", {"qk_layernorm": True, "num_key_value_heads": 1, "partial_rotary_factor": 0.34}),
    ("phi", {"num_key_value_heads": None, "tie_word_embeddings": True, "layer_norm_eps": 1e-2}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False, "sliding_window": 7, "head_dim": 18, "tie_word_embeddings": False}),
    ("starcoder2", {"num_key_value_heads": 4, "hidden_act": "gelu", "rope_parameters": YARN}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5, "attention_bias": False}),
    ("gpt_neox", {"rotary_pct": 1.0, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("gpt_neox", {"num_attention_heads": 3, "rotary_emb_base": 500, "hidden_act": "gelu_new"}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 33, "scale_attn_by_inverse_layer_idx": True, "n_head": 3}),
    ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("opt", {"ffn_dim": 50, "init_std": 0.2}),
    ("opt", {"ffn_dim": 50, "init_std": 0.2, "enable_bias": False, "activation_function": "gelu"}),
    ("stablelm", {"partial_rotary_factor": 0.5}),
    ("stablelm", {"partial_rotary_factor": 0.34, "use_qkv_bias": True, "tie_word_embeddings": True}),
    ("stablelm", {"partial_rotary_factor": 1.0, "use_parallel_residual": True, "num_key_value_heads": 1}),
]
SMALLEST = [next(case for case in CASES if case[0] == family) for family in FAMILIES]


def build(family: str, options: dict[str, Any]) -> tuple[Any, Translate]:
    kind, translate = FAMILIES[family]
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **copy.deepcopy(options)}
    return make_model(kind, values, head="LMHeadModel" if family == "gpt2" else "ForCausalLM"), translate


def assert_same_logits(decoder: Decoder, model: Any, length: int = 40) -> None:
    tokens = prompt(length)
    torch.testing.assert_close(
        all_logits(decoder, tokens), oracle_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


def from_view(definition: ModelDefinition, view: Any) -> Decoder:
    loaded = load_weights(definition, view, dtype=torch.float32, device="cpu", arena=Arena())
    assert loaded.warnings == ()
    return Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))


@pytest.mark.parametrize(("family", "options"), CASES)
def test_logits_equal_transformers(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, options)
    model.save_pretrained(tmp_path)
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    assert_same_logits(decoder_from(tmp_path, definition), model)


@pytest.mark.parametrize(("family", "options"), SMALLEST)
def test_a_living_model_gives_its_own_logits(family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, options)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    assert_same_logits(from_view(definition, ModuleView(model)), model)


@pytest.mark.parametrize(("family", "options"), SMALLEST)
def test_a_checkpoint_of_the_bare_model_is_read(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, {**options, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    prefix = f"{model.base_model_prefix}."
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    if family in ("gpt2", "gpt_neox"):
        bare[
            f"{'h' if family == 'gpt2' else 'layers'}.0.{'attn' if family == 'gpt2' else 'attention'}.bias"
        ] = torch.ones(1, 1, CONTEXT, CONTEXT)
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    assert_same_logits(decoder_from(tmp_path, definition), model)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_model_has_as_many_parameters_as_transformers_counts(family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, options)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    count = sum(math.prod(parameter.shape) for parameter in parameters(definition.spec))
    assert count == model.num_parameters()


@pytest.mark.parametrize(("family", "options"), SMALLEST)
def test_half_precision_is_close_to_transformers_own(family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, options)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    exact = oracle_logits(model, prompt(40))
    half = model.to(torch.bfloat16)
    theirs = (oracle_logits(half, prompt(40)).float() - exact).abs().mean()
    loaded = load_weights(definition, ModuleView(half), dtype=torch.bfloat16, device="cpu", arena=Arena())
    decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="bfloat16"))
    ours = (all_logits(decoder, prompt(40)).float() - exact).abs().mean()
    assert 0 < ours <= 1.25 * theirs


@pytest.mark.parametrize(("family", "options"), SMALLEST)
def test_random_weights_of_the_shapes_can_be_made(family: str, options: dict[str, Any]) -> None:
    model, translate = build(family, options)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    decoder = from_view(definition, DummyView(definition))
    assert all_logits(decoder, prompt(5)).isfinite().all()


@pytest.mark.parametrize("length", [64, 65])
def test_phi3_takes_its_long_factors_where_a_sequence_is_beyond_the_original(
    tmp_path: Path, length: int
) -> None:
    model, _ = build("phi3", {"original_max_position_embeddings": 64, "rope_scaling": longrope(6)})
    model.save_pretrained(tmp_path)
    for max_model_len in (None, length):
        definition = phi3.translate(HFConfig.from_folder(tmp_path), max_model_len=max_model_len)
        assert_same_logits(decoder_from(tmp_path, definition), model, length)


SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "ffn_dim": 72,
    "max_position_embeddings": CONTEXT,
}
GPT2_SIZES = {"vocab_size": 211, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
OLD_LONGROPE = {"original_max_position_embeddings": 64, "rope_theta": 777.0}
AS_FILES_STATE_THEM: list[tuple[str, dict[str, Any]]] = [
    *((family, SIZES) for family in FAMILIES),
    ("gpt2", {}),
    ("gpt2", {**GPT2_SIZES, "n_inner": None}),
    ("opt", {**SIZES, "word_embed_proj_dim": 48, "_remove_final_layer_norm": False}),
    ("gpt_neox", {**SIZES, "rotary_pct": 0.5, "rotary_emb_base": 777}),
    ("gpt_neox", {**SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gpt_neox", {**SIZES, "rope_parameters": {"rope_theta": 777.0, "partial_rotary_factor": 1.0}}),
    ("phi", {**SIZES, "partial_rotary_factor": 0.4, "rope_theta": 777.0, "rope_scaling": None}),
    ("phi", {**SIZES, "rope_parameters": {"rope_theta": 777.0, "partial_rotary_factor": 0.4}}),
    ("phi3", {**SIZES, "rope_theta": 777.0, "sliding_window": 2047, "partial_rotary_factor": 0.75}),
    ("phi3", {**SIZES, **OLD_LONGROPE, "rope_scaling": {**longrope(6), "type": "longrope"}}),
    (
        "phi3",
        {
            **SIZES,
            **OLD_LONGROPE,
            "rope_scaling": {**longrope(6), "rope_type": "su", "original_max_position_embeddings": 64},
        },
    ),
    (
        "phi3",
        {
            **SIZES,
            **OLD_LONGROPE,
            "rope_scaling": {**longrope(6), "rope_type": "yarn", "original_max_position_embeddings": 64},
        },
    ),
    ("phi3", {**SIZES, "rope_parameters": {**longrope(6), "original_max_position_embeddings": 64}}),
    ("stablelm", {**SIZES, "partial_rotary_factor": 0.5, "rope_theta": 777}),
    ("starcoder2", {**SIZES, "rope_theta": 777.0, "sliding_window": 4096, "norm_epsilon": 1e-3}),
]


@pytest.mark.parametrize(("family", "stated"), AS_FILES_STATE_THEM)
def test_a_config_is_understood_as_transformers_understands_it(family: str, stated: dict[str, Any]) -> None:
    kind, translate = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(stated))
    assert translate(HFConfig(stated), max_model_len=None) == translate(
        HFConfig.from_object(config), max_model_len=None
    )


@pytest.mark.parametrize(
    ("family", "stated", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True; only False"),
        ("gpt2", {"n_embd": 50}, "hidden_size 50 is no multiple of num_attention_heads 4"),
        ("gpt2", {"n_layer": "3"}, "'n_layer' must be of type int, found '3'"),
        ("gpt2", {"n_positions": 0}, "'n_positions' must be at least 1, found 0"),
        ("gpt2", {"activation_function": "tanh"}, "'activation_function' is 'tanh'; kvpage has gelu"),
        ("opt", {"do_layer_norm_before": False}, "'do_layer_norm_before' is False; only True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "'layer_norm_elementwise_affine' is False"),
        ("opt", {"_remove_final_layer_norm": True}, "'_remove_final_layer_norm' is True; only False"),
        ("opt", {"word_embed_proj_dim": 24}, r"'word_embed_proj_dim' is 24; only hidden_size \(48\)"),
        ("stablelm", {"qk_layernorm": True}, "'qk_layernorm' is True; only False"),
        ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor 1.5 of head_dim 12 is 18 elements"),
        ("gpt_neox", {"rotary_pct": 0.0}, "'partial_rotary_factor' must be above 0, found 0"),
        ("phi", {"partial_rotary_factor": 0.01}, "0.01 of head_dim 12 is 0 elements"),
        (
            "phi",
            {"partial_rotary_factor": 0.25, "rope_parameters": YARN},
            "'yarn' is not defined for 3 turned",
        ),
        ("phi3", {"rope_scaling": longrope(5)}, "short_factor must have 6 values, found 5"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'longrope' needs 'short_factor'"),
        ("starcoder2", {"partial_rotary_factor": 0.5}, "0.5 is not used by this family; only 1.0"),
        ("starcoder2", {"sliding_window": 0}, "'sliding_window' must be at least 1, found 0"),
    ],
)
def test_a_value_that_the_family_cannot_run_is_refused_by_name(
    family: str, stated: dict[str, Any], message: str
) -> None:
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    with pytest.raises(CheckpointError, match=message):
        FAMILIES[family][1](HFConfig({**sizes, **stated}), max_model_len=None)


def test_a_fused_tensor_with_more_outputs_than_the_config_says_is_refused(tmp_path: Path) -> None:
    model, _ = build("phi3", {"num_key_value_heads": 4})
    model.save_pretrained(tmp_path)
    smaller = phi3.translate(HFConfig({**SIZES, "num_key_value_heads": 2}), max_model_len=None)
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight' has 144 outputs, .* uses 96;"):
        decoder_from(tmp_path, smaller)
