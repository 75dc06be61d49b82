"""Longrope is chosen by each sequence: short factors up to the original context, long ones for all of it beyond."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import LONGROPE_16
from test_token_parity import SETTINGS, as_ids

from kvpage import Engine, SamplingParams

ORIGINAL = 64
TOKENS = 40
CONFIG = {"rope_parameters": LONGROPE_16, "original_max_position_embeddings": ORIGINAL}
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
LENGTHS = (5, 23, 24, 25, 40, 50, 62, 63, 64, 65, 66, 80, 130, 200)
"""Some end below the switch, some reach it with their last token, some cross it, some begin beyond."""


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """All begin alike: a prefix cache must tell the short ones' from the long ones'."""
    rng = random.Random(11)
    longest = [rng.randrange(3, 199) for _ in range(max(lengths))]
    return [longest[:length] for length in lengths]


@pytest.mark.parametrize("setting", SETTINGS)
def test_generations_that_cross_the_original_context_are_those_of_transformers(
    setting: str, make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    model, folder = make_model("Phi3ForCausalLM", seed=4, **CONFIG)
    prompts = prompts_of(LENGTHS)
    oracle = greedy_oracle(model, prompts, TOKENS)
    options = dict(SETTINGS[setting])
    if "num_kv_blocks" in options:
        options["num_kv_blocks"] = 32
    with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, **options) as engine:
        outputs = engine.generate(as_ids(prompts), GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == oracle
        repeated = engine.generate(as_ids(prompts), GREEDY)
        assert [o.outputs[0].token_ids for o in repeated] == oracle, "on prefix hits"
        assert engine.stats().prefix_hits > 0
        assert engine.stats().used_blocks == 0
        if "preempted" in setting:
            assert engine.stats().preemptions > 0, "the pool was not small enough to show anything"


def test_a_context_within_the_original_never_switches(
    make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    model, folder = make_model("Phi3ForCausalLM", seed=4, **CONFIG)
    prompts = prompts_of((5, 23, 24))
    with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=ORIGINAL) as engine:
        outputs = engine.generate(as_ids(prompts), GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == greedy_oracle(model, prompts, TOKENS)


def test_a_class_that_keeps_its_cache_at_the_crossing_is_compared_without_one(
    make_model: Callable[..., tuple[Any, Path]],
) -> None:
    rope = {**LONGROPE_16, "original_max_position_embeddings": ORIGINAL}
    model, folder = make_model("LlamaForCausalLM", seed=4, rope_parameters=rope)
    prompts = prompts_of((24, 25, 50, 64, 80))
    with Engine(str(folder), dtype="float32", skip_tokenizer_init=True) as engine:
        outputs = engine.generate(as_ids(prompts), GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        known = list(prompt)
        for token in output.outputs[0].token_ids:
            assert token == int(model(torch.tensor([known])).logits[0, -1].argmax()), len(known)
            known.append(token)


def test_every_choice_of_a_request_crosses_by_itself(make_model: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = make_model("Phi3ForCausalLM", seed=4, **CONFIG)
    prompts = prompts_of((50, 63, 64, 65))
    params = [
        SamplingParams(n=4, temperature=1.0, seed=i, max_tokens=TOKENS, ignore_eos=True, prompt_logprobs=1)
        for i in range(len(prompts))
    ]
    found = []
    for options in (
        {},
        {"max_num_batched_tokens": 9},
        {"max_num_seqs": 2},
        {"num_kv_blocks": 20, "block_size": 8},
    ):
        with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, **options) as engine:
            outputs = engine.generate(as_ids(prompts), params)
            found.append([[choice.token_ids for choice in output.outputs] for output in outputs])
            assert all(len(o.prompt_logprobs or ()) == len(p) for o, p in zip(outputs, prompts, strict=True))
    assert all(tokens == found[0] for tokens in found)
    assert all(len({tuple(choice) for choice in choices}) == 4 for choices in found[0])


def test_logprobs_are_those_of_the_rope_that_the_sequence_has_at_the_time(
    make_model: Callable[..., tuple[Any, Path]],
) -> None:
    model, folder = make_model("Phi3ForCausalLM", seed=4, **CONFIG)
    prompts = prompts_of((60, 64, 65))
    params = GREEDY.clone(max_tokens=8, logprobs=1, prompt_logprobs=1)
    with Engine(str(folder), dtype="float32", skip_tokenizer_init=True) as engine:
        outputs = engine.generate(as_ids(prompts), params)
    for prompt, output in zip(prompts, outputs, strict=True):
        known = list(prompt)
        scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for position, entry in enumerate((output.prompt_logprobs or [])[1:]):
            token = prompt[position + 1]
            assert entry is not None
            assert entry[token].logprob == pytest.approx(scores[position, token].item(), abs=1e-4)
        assert output.outputs[0].logprobs is not None
        for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
            scores = model(torch.tensor([known])).logits[0, -1].log_softmax(-1)
            assert entry[token].logprob == pytest.approx(scores[token].item(), abs=1e-4), len(known)
            known.append(token)
