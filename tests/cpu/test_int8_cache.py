"""An engine with its KV cache in int8: its memory is what it says, and its answers are the model's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvpage_cpu.plugin
from kvpage import Engine, PluginRegistry, SamplingParams
from kvpage.api.attention import AttentionEnv
from kvpage_cpu.attention import CpuAttention

PROMPT = "The capital of France is"
MEMORY = 2**21


def engine(kv_cache_dtype: str) -> Engine:
    return Engine(
        "demo", dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, attention_backend="cpu", decoder_backend="torch",
        kv_cache_memory=MEMORY, plugins=PluginRegistry(plugins=[kvpage_cpu.plugin], entry_points=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def in_int8() -> Iterator[Engine]:
    with engine("int8") as made:
        yield made


def test_scales_are_counted(in_int8: Engine) -> None:
    env = AttentionEnv(
        device="cpu", dtype="bfloat16", kv_dtype="int8", num_heads=6, num_kv_heads=3, head_dim=32, v_head_dim=16,
        block_size=32, num_blocks=5, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64,
    )  # fmt: skip
    layout = CpuAttention(env).kv_layout()
    assert layout.dtype == "uint8"
    assert layout.shape == (5, 32 * 3 * (32 + 16 + 4 + 4))
    config = in_int8.config
    assert config.kv_dtype == "int8"
    assert config.kv_bytes <= MEMORY < config.kv_bytes * (1 + 2 / config.num_blocks[0])


def test_int8_holds_more_tokens(in_int8: Engine) -> None:
    with engine("auto") as plain:
        assert in_int8.config.num_blocks[0] > 1.5 * plain.config.num_blocks[0]


def test_answers_are_the_models(in_int8: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=0)
    with engine("auto") as plain:
        wanted = plain.generate(PROMPT, params)[0].outputs[0].token_ids
    assert in_int8.generate(PROMPT, params)[0].outputs[0].token_ids == wanted
