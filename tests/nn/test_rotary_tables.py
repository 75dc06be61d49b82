"""Rotary tables equal transformers' to the bit, for every kind of rope."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpage.api.model import RopeSpec
from kvpage.models.hf_config import HFConfig
from kvpage.models.translation import context_length, read_rope
from kvpage.nn.rotary import build_rope

transformers = pytest.importorskip("transformers")
HEAD_DIM = 64
FACTORS = [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)]

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 5e5,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-no-truncation": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
        "beta_fast": 24,
        "beta_slow": 2,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": FACTORS,
        "long_factor": [3 * f for f in FACTORS],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}


def make_config(parameters: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_tables_equal_transformers_to_the_bit(name: str) -> None:
    config = make_config(KINDS[name])
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    length = 64  # where longrope has its short factors and dynamic its plain frequencies
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    spec = read_rope(HFConfig.from_object(config), HEAD_DIM, max_model_len=length)
    rope = build_rope(spec, length, "cpu")
    assert rope.rotary_dim == HEAD_DIM
    assert torch.equal(rope.cos, cos[0, :, : HEAD_DIM // 2])
    assert torch.equal(rope.sin, sin[0, :, : HEAD_DIM // 2])


def test_dynamic_frequencies_beyond_the_trained_length_are_those_of_max_model_len() -> None:
    config = make_config(KINDS["dynamic"])
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"](
        config, seq_len=1000
    )
    rope = build_rope(read_rope(HFConfig.from_object(config), HEAD_DIM, max_model_len=1000), 2, "cpu")
    assert torch.equal(rope.cos[1], frequencies.cos() * factor)
    assert torch.equal(rope.sin[1], frequencies.sin() * factor)


@pytest.mark.parametrize("factor", [None, 1.7])
@torch.inference_mode()
def test_longrope_has_rows_of_short_sequences_and_then_those_of_long_ones(factor: float | None) -> None:
    stated = {} if factor is None else {"attention_factor": factor}
    config = make_config({**KINDS["longrope"], **stated})
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    spec = read_rope(HFConfig.from_object(config), HEAD_DIM, max_model_len=200)
    assert spec.switch == 64
    rope = build_rope(spec, 200, "cpu", spec.switch)
    assert rope.cos.shape == rope.sin.shape == (264, HEAD_DIM // 2)
    for length, rows in ((64, slice(0, 64)), (65, slice(64, 129)), (200, slice(64, 264))):
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
        assert torch.equal(rope.cos[rows], cos[0, :, : HEAD_DIM // 2]), length
        assert torch.equal(rope.sin[rows], sin[0, :, : HEAD_DIM // 2]), length


def test_a_rope_of_one_kind_only_is_the_same_for_long_sequences() -> None:
    spec = RopeSpec(kind="default", theta=1e4, rotary_dim=8)
    assert spec.switch is None
    rope, plain = build_rope(spec, 10, "cpu", 4), build_rope(spec, 10, "cpu")
    assert torch.equal(rope.cos, torch.cat((plain.cos[:4], plain.cos)))
    assert torch.equal(rope.sin, torch.cat((plain.sin[:4], plain.sin)))


@pytest.mark.parametrize(
    ("name", "max_model_len", "context"),
    [
        ("default", None, 256),
        ("linear", None, 640),
        ("llama3", None, 256),
        ("longrope", None, 256),
        ("yarn", None, 256),
        ("yarn-mscale", None, 2560),
        ("dynamic", None, 256),
        ("dynamic", 900, 900),
        ("dynamic", 5000, 1024),
    ],
)
def test_context_follows_the_scaling(name: str, max_model_len: int | None, context: int) -> None:
    cfg = HFConfig.from_object(make_config(KINDS[name]))
    rope = read_rope(cfg, HEAD_DIM, max_model_len=max_model_len)
    assert context_length(cfg, rope, max_model_len) == context


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'spiral' is unknown; known: default"):
        build_rope(RopeSpec(kind="spiral", theta=1e4, rotary_dim=8), 4, "cpu")
