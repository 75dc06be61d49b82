"""Greedy tokens equal transformers', in whatever company and however the engine is squeezed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_cases import MODELS

from kvpage import Engine, SamplingParams

TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)

SETTINGS: dict[str, dict[str, Any]] = {
    "in a batch of 16": {},
    "in steps of 16 tokens": {"max_num_batched_tokens": 16},
    # Blocks that only the reference backend has: over it every model runs layer by layer in torch.
    "in a pool so small that sequences are preempted": {"num_kv_blocks": 24, "block_size": 8},
    "natively, in a pool so small that sequences are preempted": {"num_kv_blocks": 12, "block_size": 16},
    "with blocks of one token": {"block_size": 1},
    "one after another": {"max_num_seqs": 1},
}

NOT_NATIVE = ("deepseek-v2", "deepseek-v3")
"""Latent attention runs in torch, all else in the native backend."""
THOROUGH = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM")
"""Each in all settings, with 64 tokens; what differs between families is told by fewer."""
TELLING = ("in steps of 16 tokens", "in a pool so small that sequences are preempted")


def random_prompts(count: int, longest: int, seed: int = 5) -> list[list[int]]:
    """Half of them begin with the same 40 tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 199) for _ in range(40)]
    prompts = []
    for index in range(count):
        own = [rng.randrange(3, 199) for _ in range(rng.randint(1, longest))]
        prompts.append(shared + own if index % 2 else own)
    return prompts


def as_ids(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_gives_the_tokens_of_transformers_in_every_setting(
    name: str, make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    architecture, config = MODELS[name]
    model, folder = make_model(architecture, seed=len(name), **config)
    thorough = architecture in THOROUGH
    prompts = random_prompts(16, 60)
    params = GREEDY if thorough else GREEDY.clone(max_tokens=32)
    oracle: list[list[int]] = []
    for setting in SETTINGS if thorough else TELLING:
        options = SETTINGS[setting]
        if "num_kv_blocks" in options and not thorough:
            options = {**options, "num_kv_blocks": 18}
        if options.get("max_num_seqs") == 1:
            prompts = prompts[:3]
        with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, **options) as engine:
            by_torch = name.split(",", maxsplit=1)[0] in NOT_NATIVE or engine.config.block_size < 16
            assert engine.config.decoder_backend == ("torch" if by_torch else "cpu"), setting
            outputs = engine.generate(as_ids(prompts), params)
            if not oracle:
                oracle = greedy_oracle(
                    model, prompts, params.max_tokens, [o.outputs[0].token_ids for o in outputs]
                )
            expected = oracle[: len(prompts)]
            assert [o.outputs[0].token_ids for o in outputs] == expected, setting
            repeated = engine.generate(as_ids(prompts), params)
            assert [o.outputs[0].token_ids for o in repeated] == expected, f"{setting}, on prefix hits"
            stats = engine.stats()
            assert stats.prefix_hits > 0 or engine.config.max_num_seqs == 1, setting
            assert stats.used_blocks == 0, setting
            if "preempted" in setting:
                assert stats.preemptions > 0, "the pool was not small enough to show anything"


def test_seeded_sampling_gives_the_same_tokens_in_every_setting(
    make_model: Callable[..., tuple[Any, Path]],
) -> None:
    _, folder = make_model("LlamaForCausalLM", seed=3)
    prompts = random_prompts(6, 60)
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=index, max_tokens=TOKENS, ignore_eos=True)
        for index in range(len(prompts))
    ]
    found: dict[str, list[list[int]]] = {}
    for setting, options in SETTINGS.items():
        with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, **options) as engine:
            found[setting] = [o.outputs[0].token_ids for o in engine.generate(as_ids(prompts), params)]
            again = [o.outputs[0].token_ids for o in engine.generate(as_ids(prompts), params)]
            assert again == found[setting], f"{setting}, on prefix hits"
    assert all(tokens == found["one after another"] for tokens in found.values())
    assert len({tuple(tokens) for tokens in found["one after another"]}) == len(prompts)


def test_a_loaded_transformers_model_runs_with_its_weights_shared(
    make_model: Callable[..., tuple[Any, Path]], greedy_oracle: Callable[..., list[list[int]]]
) -> None:
    model, _ = make_model("Qwen2ForCausalLM", seed=9)
    prompts = random_prompts(4, 30)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with Engine(model, dtype="float32") as engine:
        outputs = engine.generate(as_ids(prompts), GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == greedy_oracle(model, prompts, TOKENS)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def test_a_model_made_from_a_config_alone_runs_in_its_own_dtype() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).bfloat16()
    assert model.config.architectures is None
    with Engine(model, max_model_len=64) as engine:
        assert engine.config.dtype == "bfloat16"
        assert len(engine.generate([3, 4, 5], GREEDY.clone(max_tokens=4))[0].outputs[0].token_ids) == 4
