"""Plans give the numbers that a pencil gives, and remedies that work."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest

from kvpage.api.kv import KVGroupSpec
from kvpage.api.model import (
    AttentionSpec,
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
)
from kvpage.config import EngineOptions, parse_size
from kvpage.errors import ConfigError
from kvpage.inspect.plan import Devices, MemoryPlan, PlannedModel, plan_memory

GB = 10**9


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int = 32000
) -> DecoderSpec:
    head_dim, norm = hidden // heads, NormSpec(kind="rms", eps=1e-5)
    return DecoderSpec(
        family="llama", vocab_size=vocab, hidden_size=hidden, max_position=4096, embedding=EmbeddingSpec(),
        layers=tuple(
            LayerSpec(
                mixer=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim,
                                    scale=head_dim**-0.5, kv_group=0, kv_index=index),
                ffn=MLPSpec(intermediate_size=intermediate, activation="silu"),
                mixer_norm_before=norm, ffn_norm_before=norm,
            )
            for index in range(layers)
        ),
        final_norm=norm, head=HeadSpec(tied=False),
        kv_groups=(KVGroupSpec(kind="full", layers=tuple(range(layers)), num_kv_heads=kv_heads, head_dim=head_dim,
                               v_head_dim=head_dim),),
    )  # fmt: skip


LLAMA_70B = PlannedModel(name="llama-2-70b", spec=llama(8192, 80, 64, 8, 28672), dtype="float16")
LLAMA_7B = PlannedModel(name="llama-2-7b", spec=llama(4096, 32, 32, 32, 11008), dtype="float16")
LLAMA_13B = PlannedModel(name="llama-2-13b", spec=llama(5120, 40, 40, 40, 13824), dtype="float16")


def plan(model: PlannedModel, gpu: float, count: int = 1, **options: Any) -> MemoryPlan:
    return plan_memory(
        model, EngineOptions(**options), Devices(kind="cuda", memory=int(gpu * GB), count=count)
    )


def test_weights_of_llama_2_70b_are_138_gb() -> None:
    sizes = plan(LLAMA_70B, 80, 2).weights
    assert sizes.parameters == 68_976_648_192
    # Norms are whole on each device, everything else is split.
    norms = (2 * 80 + 1) * 8192 * 2
    assert sizes.total_bytes == 2 * 68_976_648_192
    assert sizes.device_bytes == (sizes.total_bytes - norms) // 2 + norms


def test_kv_takes_320_kib_a_token_for_70b_and_512_for_7b() -> None:
    assert plan(LLAMA_70B, 80, 2).total_kv_bytes_per_token == 320 * 1024
    assert plan(LLAMA_70B, 80, 2).kv_bytes_per_token == 160 * 1024
    assert plan(LLAMA_7B, 24).kv_bytes_per_token == 512 * 1024


def test_two_80_gb_cards_leave_about_4_gb_for_kv_of_70b() -> None:
    result = plan(LLAMA_70B, 80, 2, gpu_memory_utilization=0.9)
    assert result.fits
    assert result.total_kv_memory / GB == pytest.approx(4, abs=0.25)
    assert result.sequences[4096] == result.tokens // 4096 > 0
    assert "4.0 GB left for KV" in result.to_text()


def test_four_40_gb_cards_at_0_8_cannot_load_70b_and_the_plan_says_what_to_turn() -> None:
    result = plan(LLAMA_70B, 40, 4, gpu_memory_utilization=0.8)
    assert not result.fits
    text = result.to_text()
    for word in (
        "cannot load",
        "128.0 GB",
        "138.0 GB",
        "--gpu-memory-utilization",
        "-tp 8",
        "--quantization awq",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("model", "gpu", "count"),
    [(LLAMA_7B, 24, 1), (LLAMA_13B, 24, 2), (LLAMA_70B, 80, 4)],
    ids=["7b", "13b", "70b"],
)
def test_the_usual_cards_serve_the_usual_models(model: PlannedModel, gpu: int, count: int) -> None:
    assert plan(model, gpu, count).holds_longest


@pytest.mark.parametrize(
    ("model", "devices", "options"),
    [
        (LLAMA_70B, Devices(kind="cuda", memory=40 * GB, count=4), {"gpu_memory_utilization": 0.8}),
        (LLAMA_70B, Devices(kind="cuda", memory=24 * GB), {}),
        (LLAMA_7B, Devices(kind="cuda", memory=16 * GB), {}),
        (LLAMA_7B, Devices(kind="cuda", memory=24 * GB), {"kv_cache_memory": "1GiB"}),
        (LLAMA_7B, Devices(kind="cuda", memory=24 * GB), {"num_kv_blocks": 5000}),
        (LLAMA_7B, Devices(kind="cpu", memory=16 * 2**30), {}),
        (LLAMA_7B, Devices(kind="cpu", memory=8 * 2**30), {}),
        (replace(LLAMA_7B, dtype="float32"), Devices(kind="cpu", memory=24 * 2**30), {}),
    ],
)
def test_every_remedy_works_when_it_is_followed(
    model: PlannedModel, devices: Devices, options: dict[str, Any]
) -> None:
    result = plan_memory(model, EngineOptions(**options), devices)
    assert not result.holds_longest
    assert result.remedies
    for remedy in result.remedies:
        assert follow(remedy.flags, model, options, devices).holds_longest, remedy.flags


def follow(flags: str, model: PlannedModel, options: dict[str, Any], devices: Devices) -> MemoryPlan:
    options, words = dict(options), shlex.split(flags)
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "-tp":
            devices = replace(devices, count=int(value))
        elif flag in ("--gpu", "--memory"):
            devices = replace(devices, memory=parse_size(value) or 0)
        else:
            name = flag.removeprefix("--").replace("-", "_")
            number = name.startswith("max_")
            options[name] = (
                int(value) if number else float(value) if name == "gpu_memory_utilization" else value
            )
            if name == "kv_cache_memory":
                options.pop("num_kv_blocks", None)
    return plan_memory(model, EngineOptions(**options), devices)


def test_kv_heads_are_repeated_where_devices_outnumber_them() -> None:
    eight, sixteen = plan(LLAMA_70B, 80, 8), plan(LLAMA_70B, 80, 16)
    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token == 40 * 1024
    assert sixteen.weights.device_bytes > eight.weights.device_bytes / 2


def test_an_int8_cache_has_a_scale_for_each_vector() -> None:
    elements, vectors = 80 * 8 * (128 + 128), 80 * 8 * 2
    assert plan(LLAMA_70B, 80, 2, kv_cache_dtype="int8").total_kv_bytes_per_token == elements + 4 * vectors


def test_heads_that_cannot_be_split_are_refused_with_the_counts_that_work() -> None:
    with pytest.raises(
        ConfigError, match=r"64 attention heads do not divide by 3.*possible are 1, 2, 4, 8, 16"
    ):
        plan(LLAMA_70B, 80, 3)


def test_a_context_beyond_the_model_is_refused_as_the_engine_refuses_it() -> None:
    with pytest.raises(ConfigError, match="4096"):
        plan(LLAMA_70B, 80, 4, max_model_len=8192)


def test_awq_takes_about_a_quarter() -> None:
    whole, packed = plan(LLAMA_70B, 80, 2), plan(LLAMA_70B, 80, 2, quantization="awq")
    assert packed.weights.total_bytes / whole.weights.total_bytes == pytest.approx(0.265, abs=0.01)
    with pytest.raises(ConfigError, match="known are"):
        plan(LLAMA_70B, 80, 2, quantization="sevenbit")


def test_a_pool_smaller_than_the_longest_sequence_starts_but_says_so() -> None:
    result = plan(LLAMA_7B, 24, num_kv_blocks=100)
    assert result.fits
    assert result.tokens == 1600
    assert result.sequences == {512: 3, 2048: 0, 4096: 0}
    assert "--max-model-len 1024" in [remedy.flags for remedy in result.remedies]


def test_on_a_cpu_the_engine_s_own_rule_decides() -> None:
    small = PlannedModel(name="small", spec=llama(512, 4, 8, 8, 1024), dtype="float32")
    result = plan_memory(small, EngineOptions(), Devices(kind="cpu", memory=64 * 2**30))
    assert result.resolved.max_num_seqs == 64
    assert result.kv_memory <= 4 * 2**30
    assert "the least on a CPU" in result.resolved.reasons["kv_memory"]


def test_weights_from_file_headers_replace_the_estimate() -> None:
    from kvpage.api.model import WeightRef
    from kvpage.inspect.model_size import StoredTensor

    spec = llama(64, 1, 4, 4, 128, vocab=100)
    packed = PlannedModel(
        name="packed", spec=spec, dtype="float16",
        weights={"layers.0.mlp.up.weight": WeightRef(name="up.weight"), "embed.weight": WeightRef(name="e.weight")},
        stored={
            "up.qweight": StoredTensor(dtype="I32", count=1024, nbytes=4096),
            "up.scales": StoredTensor(dtype="F16", count=64, nbytes=128),
            "e.weight": StoredTensor(dtype="F32", count=6400, nbytes=25600),
        },
    )  # fmt: skip
    plain = plan(PlannedModel(name="plain", spec=spec, dtype="float16"), 24).weights
    sizes = plan(packed, 24).weights
    assert plain.total["mlp"] - sizes.total["mlp"] == 2 * 64 * 128 - 4224
    assert sizes.total["embedding"] == 6400 * 2


def test_the_plan_as_json_has_what_the_text_has() -> None:
    result = plan(LLAMA_70B, 40, 4, gpu_memory_utilization=0.8)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["fits"] is False
    assert data["missing"] == result.missing > 0
    assert data["weights"]["parameters"] == 68_976_648_192
    assert [remedy["flags"] for remedy in data["remedies"]] == [remedy.flags for remedy in result.remedies]
