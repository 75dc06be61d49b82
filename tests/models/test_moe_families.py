"""Mixture-of-experts families give transformers' logits, whichever way a checkpoint holds its experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import all_logits, decoder_from
from test_family_parity import BASE, YARN, make_model, oracle_logits, prompt

from kvpage.api.model import DecoderEnv, ExpertGroups, MLPSpec, ModelDefinition, MoESpec
from kvpage.api.parameters import parameters
from kvpage.api.quant import ChannelInt8, Dense
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena
from kvpage.loading.readers import DummyView, ModuleView, open_checkpoint
from kvpage.loading.weights import load_weights
from kvpage.models.decoder import Decoder
from kvpage.models.families import deepseek_v2, deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3_moe
from kvpage.models.hf_config import HFConfig
from kvpage.nn.moe import MoE
from kvpage_int8.schemes import Int8

Translate = Callable[..., ModelDefinition]

MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN2 = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
QWEN3 = {"num_experts": 7, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "head_dim": 16}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": 0, "eos_token_id": 2}

CASES: dict[str, tuple[str, Translate, dict[str, Any]]] = {
    "mixtral": ("Mixtral", mixtral.translate, MIXTRAL),
    "mixtral-window-tied-one-expert-a-token": (
        "Mixtral",
        mixtral.translate,
        {**MIXTRAL, "num_experts_per_tok": 1, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "mixtral-all-experts-wide-heads": (
        "Mixtral",
        mixtral.translate,
        {**MIXTRAL, "num_experts_per_tok": 5, "head_dim": 20, "num_key_value_heads": 1},
    ),
    "qwen2-moe": ("Qwen2Moe", qwen2_moe.translate, QWEN2),
    "qwen2-moe-renormalised-without-biases": (
        "Qwen2Moe",
        qwen2_moe.translate,
        {**QWEN2, "norm_topk_prob": True, "qkv_bias": False, "hidden_act": "gelu"},
    ),
    "qwen2-moe-every-second-layer-windows": (
        "Qwen2Moe",
        qwen2_moe.translate,
        {**QWEN2, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2-moe-some-layers-plain": (
        "Qwen2Moe",
        qwen2_moe.translate,
        {**QWEN2, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "qwen2-moe-no-experts": ("Qwen2Moe", qwen2_moe.translate, {**QWEN2, "num_experts": 0}),
    "qwen3-moe": ("Qwen3Moe", qwen3_moe.translate, QWEN3),
    "qwen3-moe-renormalised-windows": (
        "Qwen3Moe",
        qwen3_moe.translate,
        {**QWEN3, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen3-moe-sparse-step-biases-yarn": (
        "Qwen3Moe",
        qwen3_moe.translate,
        {
            **QWEN3,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0],
            "attention_bias": True,
            "rope_parameters": {**YARN, "rope_theta": 1e5},
        },
    ),
    "olmoe": ("Olmoe", olmoe.translate, OLMOE),
    "olmoe-renormalised-biases-no-grouping": (
        "Olmoe",
        olmoe.translate,
        {**OLMOE, "norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 4},
    ),
}
LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
DEEPSEEK_YARN = {**YARN, "rope_theta": 1e4, "mscale": 0.707, "mscale_all_dim": 0.707}
CASES |= {
    "deepseek-v2": ("DeepseekV2", deepseek_v2.translate, LATENT),
    "deepseek-v2-groups-yarn-biases": (
        "DeepseekV2",
        deepseek_v2.translate,
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "rope_parameters": DEEPSEEK_YARN,
            "attention_bias": True,
            "mlp_bias": True,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-no-query-latent-wide-values": (
        "DeepseekV2",
        deepseek_v2.translate,
        {**LATENT, "q_lora_rank": None, "v_head_dim": 24, "n_shared_experts": 1},
    ),
    "deepseek-v3": ("DeepseekV3", deepseek_v3.translate, LATENT),
    "deepseek-v3-yarn-halves-not-renormalised": (
        "DeepseekV3",
        deepseek_v3.translate,
        {
            **LATENT,
            "rope_parameters": DEEPSEEK_YARN,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
        },
    ),
}
FAMILIES = ["deepseek-v2", "deepseek-v3", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe"]


def make_moe(name: str, **values: Any) -> tuple[Any, Translate]:
    """A random model of a case, and its family; the corrections of DeepSeek-V3's routers are random too."""
    kind, translate, options = CASES[name]
    model = make_model(kind, {**options, **values})
    for buffer, tensor in model.named_buffers():
        if buffer.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(-0.3, 0.3, len(tensor)))
    return model, translate


def assert_same_logits(decoder: Decoder, model: Any) -> None:
    tokens = prompt(40)
    torch.testing.assert_close(
        all_logits(decoder, tokens), oracle_logits(model, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("as_in_memory", [False, True], ids=["a tensor an expert", "all experts in one"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_with_either_layout_on_disk(
    tmp_path: Path, name: str, as_in_memory: bool
) -> None:
    model, translate = make_moe(name)
    model.save_pretrained(tmp_path, save_original_format=not as_in_memory)
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    assert_same_logits(decoder_from(tmp_path, definition), model)


@pytest.mark.parametrize("name", CASES)
def test_the_spec_has_as_many_parameters_as_the_model(name: str) -> None:
    model, translate = make_moe(name)
    spec = translate(HFConfig.from_object(model.config), max_model_len=None).spec
    sizes = [math.prod(part.shape) for part in parameters(spec) if part.kind != "float32"]
    assert sum(sizes) == model.num_parameters(), "corrections are buffers, which transformers does not count"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_living_model_is_used_without_a_copy(name: str) -> None:
    model, translate = make_moe(name)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    arena = Arena()
    loaded = load_weights(definition, ModuleView(model), dtype=torch.float32, device="cpu", arena=arena)
    owned = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    held = [form.tensor for form in loaded.weights.values() if isinstance(form, Dense)]
    assert len(held) == len(loaded.weights)
    assert {tensor.untyped_storage().data_ptr() for tensor in held} == owned
    assert loaded.warnings == ()
    fused = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    up = loaded.weights["layers.1.moe.experts.2.up.weight"]
    assert isinstance(up, Dense)
    assert up.tensor.data_ptr() == fused[2, fused.shape[1] // 2].data_ptr()
    decoder = Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32"))
    assert_same_logits(decoder, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_living_model_in_another_dtype_is_converted(name: str) -> None:
    model, translate = make_moe(name)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    loaded = load_weights(definition, ModuleView(model), dtype=torch.bfloat16, device="cpu", arena=Arena())
    down = loaded.weights["layers.1.moe.experts.3.down.weight"]
    assert isinstance(down, Dense)
    assert torch.equal(down.tensor, model.model.layers[1].mlp.experts.down_proj[3].detach().bfloat16())


@pytest.mark.parametrize("name", FAMILIES)
def test_dummy_weights_have_the_shapes_of_the_spec(name: str) -> None:
    model, translate = make_moe(name)
    definition = translate(HFConfig.from_object(model.config), max_model_len=None)
    view = DummyView(definition)
    loaded = load_weights(definition, view, dtype=torch.float32, device="cpu", arena=Arena())
    logits = all_logits(
        Decoder(definition.spec, loaded.weights, DecoderEnv(device="cpu", dtype="float32")), prompt(9)
    )
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mixtral", {"num_experts_per_tok": 5}),
        ("qwen2-moe", {"num_experts_per_tok": 6}),
        ("deepseek-v3", {"num_experts_per_tok": 8, "topk_group": 4}),
    ],
)
def test_half_precision_is_close_to_transformers_own(
    tmp_path: Path, name: str, values: dict[str, Any], dtype: torch.dtype
) -> None:
    # Every expert is used: no token may be routed elsewhere by a rounding, which would drown all else.
    model, translate = make_moe(name, moe_intermediate_size=24, initializer_range=0.05, **values)
    model.save_pretrained(tmp_path)
    exact = oracle_logits(model, prompt(40))
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    ours = (all_logits(decoder_from(tmp_path, definition, dtype), prompt(40)).float() - exact).abs().mean()
    theirs = (oracle_logits(model.to(dtype), prompt(40)).float() - exact).abs().mean()
    assert ours <= 1.25 * theirs


ROUTINGS: list[dict[str, Any]] = [
    {"renormalise": True},
    {"renormalise": False, "groups": ExpertGroups(count=3, chosen=2, score="best"), "scale": 1.5},
    {"score": "sigmoid", "correction": True, "groups": ExpertGroups(count=5, chosen=4, score="best_two")},
]


@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 10])
@pytest.mark.parametrize("routing", ROUTINGS)
@torch.inference_mode()
def test_a_row_alone_gives_what_it_gives_in_a_batch(top_k: int, routing: dict[str, Any]) -> None:
    mlp = MLPSpec(intermediate_size=40, activation="silu")
    spec = MoESpec(expert=mlp, num_experts=15, top_k=top_k, shared=mlp, shared_gate=True, **routing)
    generator = torch.Generator().manual_seed(top_k)

    def random(*shape: int) -> Dense:
        return Dense(torch.randn(shape, generator=generator) * 0.3)

    weights = {"moe.router.weight": random(15, 48), "moe.shared_gate.weight": random(1, 48)}
    weights["moe.router.correction"] = random(15)
    for owner in ("shared", *(f"experts.{expert}" for expert in range(15))):
        gate_and_up = random(80, 48).tensor
        weights[f"moe.{owner}.gate.weight"] = Dense(gate_and_up[:40])
        weights[f"moe.{owner}.up.weight"] = Dense(gate_and_up[40:])
        weights[f"moe.{owner}.down.weight"] = random(48, 40)
    moe = MoE(spec, weights, "moe", DecoderEnv(device="cpu", dtype="float32"))
    x = torch.randn(37, 48, generator=generator)
    together = moe(x)
    for row in range(37):
        assert torch.equal(moe(x[row : row + 1])[0], together[row])
    assert torch.equal(moe(x[:7]), together[:7])
    assert moe(x[:0]).shape == (0, 48)


def test_the_corrections_of_a_router_stay_in_float32(tmp_path: Path) -> None:
    model, translate = make_moe("deepseek-v3")
    model.bfloat16().save_pretrained(tmp_path)
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    view = open_checkpoint(tmp_path)
    loaded = load_weights(definition, view, dtype=torch.bfloat16, device="cpu", arena=Arena())
    correction = loaded.weights["layers.1.moe.router.correction"]
    assert isinstance(correction, Dense)
    assert correction.tensor.dtype == torch.float32
    stored = view.read("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(correction.tensor, stored.float())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than num_local_experts 5"),
    ("mixtral", {"num_local_experts": 0}, "'num_local_experts' must be at least 1"),
    ("mixtral", {"sliding_window": 0}, "'sliding_window' must be at least 1"),
    ("mixtral", {"hidden_act": "tanh"}, "'hidden_act' is 'tanh'"),
    ("qwen2-moe", {"num_experts": "many"}, "'num_experts' must be of type int"),
    ("qwen2-moe", {"decoder_sparse_step": 0}, "'decoder_sparse_step' must be at least 1"),
    ("qwen2-moe", {"mlp_only_layers": ["0"]}, "'mlp_only_layers' must be of type int"),
    ("qwen2-moe", {"layer_types": ["full_attention"]}, "layer_types must have 3 entries"),
    ("qwen3-moe", {"num_experts_per_tok": 8}, "num_experts_per_tok 8 is more than num_experts 7"),
    ("qwen3-moe", {"moe_intermediate_size": -1}, "'moe_intermediate_size' must be at least 1"),
    ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is unknown; kvpage has greedy"),
    ("deepseek-v2", {"num_key_value_heads": 2}, "num_key_value_heads 2 must equal num_attention_heads 4"),
    ("deepseek-v3", {"n_group": 3}, "n_group 3 and topk_group 2 do not fit n_routed_experts 8"),
    ("deepseek-v3", {"n_group": 8}, "groups must be of one size, 2 at least"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported, only null"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_values_a_family_cannot_run_are_refused_by_name(
    name: str, options: dict[str, Any], reason: str
) -> None:
    _, translate, base = CASES[name]
    with pytest.raises(CheckpointError, match=reason):
        translate(HFConfig({**BASE, **base, **options}), max_model_len=None)


def test_keys_a_config_leaves_out_have_the_values_of_transformers() -> None:
    import transformers

    size = {"num_hidden_layers": 2, "num_attention_heads": 32, "hidden_size": 64, "vocab_size": 64}
    for name in FAMILIES:
        kind, translate, _ = CASES[name]
        given = {**size, "intermediate_size": 48}
        if name.startswith("deepseek"):
            # transformers' own values do not fit these: it has none for V2's experts, and 128 KV heads for V3.
            given |= {"num_experts_per_tok": 6, "num_key_value_heads": 32}
        stated = getattr(transformers, f"{kind}Config")(**given)
        bare = {**given, "max_position_embeddings": stated.max_position_embeddings}
        found = translate(HFConfig(bare), max_model_len=None)
        assert found == translate(HFConfig.from_object(stated), max_model_len=None), name


def test_experts_of_another_shape_are_refused_by_tensor_and_entry() -> None:
    model, translate = make_moe("mixtral")
    values = HFConfig({**model.config.to_dict(), "intermediate_size": 73})
    with pytest.raises(
        CheckpointError, match=r"experts.gate_up_proj' should have shape \[73, 48\].*in entry 0"
    ):
        load_weights(
            translate(values, max_model_len=None),
            ModuleView(model),
            dtype=torch.float32,
            device="cpu",
            arena=Arena(),
        )


def test_the_matrices_of_latent_attention_are_packed_by_a_scheme_like_all_others(tmp_path: Path) -> None:
    model, translate = make_moe("deepseek-v2")
    model.save_pretrained(tmp_path)
    definition = translate(HFConfig.from_folder(tmp_path), max_model_len=None)
    loaded = load_weights(
        definition,
        open_checkpoint(tmp_path),
        dtype=torch.float32,
        device="cpu",
        arena=Arena(),
        scheme=Int8(),
    )
    mixers = {name: form for name, form in loaded.weights.items() if ".mixer." in name and "norm" not in name}
    assert mixers
    assert all(isinstance(form, ChannelInt8) for form in mixers.values())
    norms = [form for name, form in loaded.weights.items() if ".mixer." in name and "norm" in name]
    assert norms
    assert all(isinstance(form, Dense) for form in norms)
