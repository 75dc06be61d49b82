"""Gemma 1 to 3, Cohere 1 and 2, OLMo 2 and 3, Granite and SmolLM3 give transformers' logits and read its configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import all_logits, decoder_from
from test_family_parity import LLAMA3, YARN, make_model, oracle_logits, prompt

from kvpage.api.model import DecoderEnv, ModelDefinition, NormSpec
from kvpage.api.parameters import parameters
from kvpage.api.quant import Dense
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena
from kvpage.loading.readers import ModuleView, open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.families import cohere, cohere2, gemma, gemma2, gemma3, granite, olmo2, olmo3, smollm3
from kvpage.models.hf_config import HFConfig
from kvpage.nn.norm import build_norm

transformers = pytest.importorskip("transformers")

FAMILIES: dict[str, Callable[..., ModelDefinition]] = {
    "Gemma": gemma.translate,
    "Gemma2": gemma2.translate,
    "Gemma3": gemma3.translate,
    "Cohere": cohere.translate,
    "Cohere2": cohere2.translate,
    "Olmo2": olmo2.translate,
    "Olmo3": olmo3.translate,
    "Granite": granite.translate,
    "SmolLM3": smollm3.translate,
}
FULL, SLIDING = "full_attention", "sliding_attention"
CAPS = {"attn_logit_softcapping": 2.5, "final_logit_softcapping": 4.0}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 9e4}
PLAIN = {"rope_type": "default", "rope_theta": 3e3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma, one KV head, biases, untied": (
        "Gemma",
        {"head_dim": 20, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma, gelu means its approximation": ("Gemma", {"head_dim": 12, "hidden_act": "gelu"}),
    "gemma, llama3 rope": ("Gemma", {"head_dim": 16, "rope_parameters": {**LLAMA3, "rope_theta": 5e4}}),
    "gemma2": ("Gemma2", {"head_dim": 20, "sliding_window": 7, "query_pre_attn_scalar": 30, **CAPS}),
    "gemma2, no caps, untied, biases": (
        "Gemma2",
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": False, **NO_CAPS},
    ),
    "gemma2, its own layer types": (
        "Gemma2",
        {"head_dim": 12, "sliding_window": 5, "layer_types": [FULL, FULL, SLIDING], "num_key_value_heads": 1},
    ),
    "gemma3, seven layers by pattern": (
        "Gemma3",
        {"head_dim": 12, "sliding_window": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 20},
    ),
    "gemma3, two ropes, a cap, biases, untied": (
        "Gemma3",
        {
            "head_dim": 20,
            "sliding_window": 9,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {FULL: LINEAR, SLIDING: PLAIN},
            "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "cohere": ("Cohere", {"logit_scale": 0.7}),
    "cohere, norm on q and k, biases, untied": (
        "Cohere",
        {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False, "head_dim": 14},
    ),
    "cohere, norm on q and one k, yarn": (
        "Cohere",
        {"use_qk_norm": True, "num_key_value_heads": 1, "rope_parameters": {**YARN, "rope_theta": 1e4}},
    ),
    "cohere2, by pattern": ("Cohere2", {"num_hidden_layers": 5, "sliding_window": 7, "logit_scale": 0.9}),
    "cohere2, its own layer types, biases": (
        "Cohere2",
        {
            "layer_types": [FULL, SLIDING, FULL],
            "sliding_window": 4,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": LINEAR,
        },
    ),
    "olmo2": ("Olmo2", {"rms_norm_eps": 1e-3}),
    "olmo2, no grouping, biases, tied": (
        "Olmo2",
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "olmo3, by pattern": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 6}),
    "olmo3, yarn in full layers": (
        "Olmo3",
        {
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 6,
            "rope_parameters": {FULL: {**YARN, "rope_theta": 2e4}, SLIDING: PLAIN},
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.07,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "granite, biases, tied, no multipliers": (
        "Granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 14},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3, windows where there is no rope": (
        "SmolLM3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "smollm3, windows by layer types": (
        "SmolLM3",
        {
            "no_rope_layer_interval": 2,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 8,
            "num_key_value_heads": 1,
            "rope_parameters": {**YARN, "rope_theta": 1e4},
        },
    ),
}


def tiny(kind: str, options: dict[str, Any]) -> Any:
    """A model whose scores reach its soft caps; transformers has those in eager attention only."""
    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    return make_model(kind, {**values, "attn_implementation": "eager"})


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_logits_and_number_of_parameters_equal_transformers(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model = tiny(kind, options)
    model.save_pretrained(tmp_path)
    definition = FAMILIES[kind](HFConfig.from_folder(tmp_path), max_model_len=None)
    assert sum(prod(part.shape) for part in parameters(definition.spec)) == model.num_parameters()
    assert_close(all_logits(decoder_from(tmp_path, definition), prompt(40)), oracle_logits(model, prompt(40)))


@pytest.mark.parametrize("case", [case for case in CASES if "," in case])
def test_a_living_model_gives_its_own_logits(case: str) -> None:
    kind, options = CASES[case]
    model = tiny(kind, options)
    definition = FAMILIES[kind](HFConfig.from_object(model.config), max_model_len=None)
    assert_close(living_logits(model, definition), oracle_logits(model, prompt(40)))


def living_logits(model: Any, definition: ModelDefinition) -> torch.Tensor:
    loaded = load_weights(definition, ModuleView(model), dtype=torch.float32, device="cpu", arena=Arena())
    decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))
    return all_logits(decoder, prompt(40))


SIZES = {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 72, "num_attention_heads": 16}
OLD: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma as first released": (
        "Gemma",
        {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 5e3},
    ),
    "gemma2": ("Gemma2", {"rope_theta": 5e3, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "x"}),
    "gemma2 without caps": ("Gemma2", NO_CAPS),
    "gemma3, local base and pattern": (
        "Gemma3",
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
            "sliding_window": 512,
        },
    ),
    "cohere": ("Cohere", {"rope_theta": 8e6, "num_key_value_heads": None}),
    "cohere2, pattern": ("Cohere2", {"rope_theta": 5e4, "sliding_window_pattern": 3}),
    "olmo2": ("Olmo2", {"rope_theta": 5e5, "rope_scaling": None}),
    "olmo3": ("Olmo3", {"rope_theta": 5e5, "rope_scaling": {**YARN, "attention_factor": 1.2}}),
    "granite": ("Granite", {"rope_theta": 5e6, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "smollm3": ("SmolLM3", {"rope_theta": 5e6, "no_rope_layers": [1, 1, 0, 1, 1, 1, 0]}),
    "smollm3, windows where there is no rope": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 64, "no_rope_layer_interval": 3},
    ),
} | {f"{kind}, sizes alone": (kind, {}) for kind in FAMILIES}


@pytest.mark.parametrize(("kind", "old"), OLD.values(), ids=OLD)
def test_old_keys_and_omitted_ones_mean_what_transformers_makes_of_them(
    tmp_path: Path, kind: str, old: dict[str, Any]
) -> None:
    values = {**SIZES, "num_hidden_layers": 7, **old}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = getattr(transformers, f"{kind}ForCausalLM").config_class.from_pretrained(tmp_path)
    expected = FAMILIES[kind](HFConfig.from_object(config), max_model_len=None)
    assert FAMILIES[kind](HFConfig.from_folder(tmp_path), max_model_len=None) == expected
    assert expected.spec.layers[0].mixer != expected.spec.layers[-1].mixer or kind not in (
        "Cohere2",
        "SmolLM3",
    )


MULTIMODAL = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "image_token_index": 200,
    "mm_tokens_per_image": 4,
    "text_config": {
        **SIZES,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 12,
        "sliding_window": 6,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def test_a_multimodal_gemma3_runs_as_text_from_a_file_and_from_memory(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(**{**MULTIMODAL, "attn_implementation": "eager"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
    expected = oracle_logits(model, prompt(40))
    model.save_pretrained(tmp_path)
    definition = gemma3.translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    loaded = load_weights(
        definition, open_checkpoint(tmp_path), dtype=torch.float32, device="cpu", arena=Arena()
    )
    decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))
    assert_close(all_logits(decoder, prompt(40)), expected)
    assert len(loaded.warnings) == 1
    assert "not used by this model" in loaded.warnings[0]
    assert "language_model" not in loaded.warnings[0]
    living = gemma3.translate(HFConfig.from_object(model.config), max_model_len=None)
    assert_close(living_logits(model, living), expected)


def test_a_text_part_that_leaves_its_sizes_out_has_those_of_gemma3() -> None:
    stated = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    cfg = HFConfig({"text_config": {**stated, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}})
    spec = gemma3.translate(cfg, max_model_len=None).spec
    theirs = transformers.Gemma3TextConfig(**stated)
    assert (spec.vocab_size, spec.hidden_size) == (theirs.vocab_size, 2560)
    assert spec.max_position == theirs.max_position_embeddings
    assert spec.attention[0].num_kv_heads == theirs.num_key_value_heads
    assert spec.attention[5].rope.kind == "linear"
    assert spec.attention[4].rope.kind == "default"


BIDIRECTIONAL = "key 'use_bidirectional_attention' is true; kvpage runs causal attention only"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("Gemma", {"use_bidirectional_attention": True}, BIDIRECTIONAL),
        ("Gemma2", {"use_bidirectional_attention": True}, BIDIRECTIONAL),
        ("Gemma3", {"use_bidirectional_attention": True}, BIDIRECTIONAL),
        ("Gemma2", {"attn_logit_softcapping": 0.0}, "'attn_logit_softcapping' must be above 0, or null"),
        ("Gemma2", {"final_logit_softcapping": -1}, "'final_logit_softcapping' must be above 0, or null"),
        ("Gemma2", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window"),
        ("Gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be at least 1, found 0"),
        ("Gemma2", {"hidden_activation": "mish"}, "'hidden_activation' is 'mish'; kvpage has gelu"),
        ("Gemma3", {"layer_types": [FULL, "chunked_attention", FULL]}, "layer_types has chunked_attention"),
        ("Gemma3", {"layer_types": [FULL]}, "layer_types must have 3 entries"),
        ("Gemma3", {"sliding_window_pattern": 0}, "'sliding_window_pattern' must be at least 1, found 0"),
        ("Gemma3", {"rope_parameters": PLAIN}, "must have an entry for each of full_attention, sliding"),
        (
            "Gemma3",
            {"rope_parameters": {FULL: PLAIN, SLIDING: 5}},
            "'sliding_attention' must be of type dict",
        ),
        ("Cohere", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not used by this family"),
        ("Cohere2", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window"),
        ("Olmo3", {"rope_scaling": {"rope_type": "spiral"}}, "rope_type 'spiral' is unknown"),
        ("Granite", {"logits_scaling": 0}, "'logits_scaling' is 0; logits are divided by it"),
        ("Granite", {"residual_multiplier": "x"}, "'residual_multiplier' must be of type float, found 'x'"),
        ("SmolLM3", {"no_rope_layers": [1]}, "no_rope_layers must have 3 entries"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers must hold 0 and 1 only, found 2"),
        ("SmolLM3", {"no_rope_layer_interval": 0}, "'no_rope_layer_interval' must be at least 1, found 0"),
    ],
)
def test_a_value_that_cannot_be_run_is_refused(kind: str, values: dict[str, Any], message: str) -> None:
    cfg = HFConfig({**SIZES, "num_hidden_layers": 3, **values}, source="config.json")
    with pytest.raises(CheckpointError, match=message):
        FAMILIES[kind](cfg, max_model_len=None)


def test_the_norm_of_olmo2_is_rounded_after_its_weight_as_transformers_does() -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    generator = torch.Generator().manual_seed(0)
    theirs = Olmo2RMSNorm(64, 1e-5).bfloat16()
    theirs.weight.data.copy_(torch.rand(64, generator=generator) + 0.5)
    x = torch.randn(50, 64, generator=generator).bfloat16()
    cfg = HFConfig({**SIZES, "num_hidden_layers": 1, "rms_norm_eps": 1e-5})
    spec = olmo2.translate(cfg, max_model_len=None).spec.final_norm
    with torch.inference_mode():
        weights = {"n.weight": Dense(theirs.weight.data)}
        assert torch.equal(build_norm(spec, weights, "n")(x), theirs(x))
        rounded_before = build_norm(NormSpec(kind="rms", eps=1e-5), weights, "n")(x)
        assert not torch.equal(rounded_before, theirs(x))


def test_a_weight_for_each_head_is_for_layer_norms_alone() -> None:
    weights = {"n.weight": Dense(torch.ones(2, 4))}
    with pytest.raises(ValueError, match="layer norms without bias only"):
        build_norm(NormSpec(kind="rms", eps=1e-5), weights, "n")
