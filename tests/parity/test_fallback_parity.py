"""Architectures without a family: greedy tokens equal transformers', through its own code over paged KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FALLBACK_MODELS
from test_token_parity import SETTINGS, as_ids, random_prompts

from kvpage import Engine, SamplingParams

TOKENS = 28
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
CHOSEN = ("in steps of 16 tokens", "in a pool so small that sequences are preempted")


@pytest.mark.parametrize("name", FALLBACK_MODELS)
def test_a_model_without_a_family_gives_the_tokens_of_transformers(
    name: str, make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    architecture, config = FALLBACK_MODELS[name]
    model, folder = make_model(architecture, seed=len(name), **config)
    prompts = random_prompts(6, 40)
    oracle: list[list[int]] = []
    for setting in CHOSEN:
        options = SETTINGS[setting]
        if "num_kv_blocks" in options:
            options = {**options, "num_kv_blocks": 16}
        with Engine(
            str(folder), dtype="float32", skip_tokenizer_init=True, model_impl="transformers", **options
        ) as engine:
            outputs = engine.generate(as_ids(prompts), GREEDY)
            if not oracle:
                oracle = greedy_oracle(model, prompts, TOKENS, [o.outputs[0].token_ids for o in outputs])
            assert [o.outputs[0].token_ids for o in outputs] == oracle, setting
            repeated = engine.generate(as_ids(prompts), GREEDY)
            assert [o.outputs[0].token_ids for o in repeated] == oracle, f"{setting}, on prefix hits"
            stats = engine.stats()
            assert stats.used_blocks == 0, setting
            if "preempted" in setting:
                assert stats.preemptions > 0, "the pool was not small enough to show anything"


def test_an_architecture_without_a_family_takes_the_fallback_by_itself_and_says_so(
    make_model: Callable[..., tuple[Any, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = make_model("ArceeForCausalLM")
    with caplog.at_level("INFO", logger="kvpage"), Engine(str(folder), skip_tokenizer_init=True) as engine:
        assert "transformers fallback (ArceeForCausalLM)" in engine.config.reasons["model_impl"]
        assert engine.config.decoder_backend == "transformers"
    assert "model path: transformers fallback (ArceeForCausalLM)" in caplog.text


def test_rope_that_depends_on_the_batch_has_the_frequencies_of_the_longest_sequence(
    make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model, folder = make_model("ArceeForCausalLM", rope_parameters=dynamic, max_position_embeddings=64)
    prompts = random_prompts(3, 40)
    with Engine(
        str(folder), skip_tokenizer_init=True, max_model_len=160, allow_long_max_model_len=True
    ) as engine:
        outputs = engine.generate(as_ids(prompts), GREEDY)
    rotary = model.model.rotary_emb
    rotary(model.model.embed_tokens.weight[:1, None], position_ids=torch.tensor([[159]]))
    rotary.rope_type = "default"
    assert [o.outputs[0].token_ids for o in outputs] == greedy_oracle(model, prompts, TOKENS)
