"""Vectors of prompts equal those made of transformers' last hidden states, in whatever company and chunks."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import MODELS

from kvpage import Engine, SamplingParams
from kvpage.params import Pooling

TOLERANCE = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "in one batch": {},
    "in steps of 7 tokens": {"max_num_batched_tokens": 7},
    "in a pool so small that sequences are preempted": {
        "num_kv_blocks": 16, "block_size": 8, "max_num_batched_tokens": 16, "max_model_len": 128,
    },
    "one after another": {"max_num_seqs": 1},
}  # fmt: skip
WRITING = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def vectors_of(model: Any, prompts: list[list[int]], pooling: Pooling) -> torch.Tensor:
    """float64 [prompts, H] from transformers, each prompt alone; not normalised."""
    found = []
    for prompt in prompts:
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double()
        found.append(states.mean(0) if pooling == "mean" else states[-1])
    return torch.stack(found)


def as_tensor(embeddings: list[array[float]]) -> torch.Tensor:
    return torch.tensor([list(embedding) for embedding in embeddings], dtype=torch.float64)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2, windows, soft caps",
        "qwen2, window on some layers",
        "phi3, longrope crossed while generating",
    ],
)
def test_vectors_are_those_of_transformers_in_every_setting(
    name: str, make_model: Callable[..., tuple[Any, Path]]
) -> None:
    architecture, config = MODELS[name]
    model, folder = make_model(architecture, seed=len(name), **config)
    rng = random.Random(1)
    shared = [rng.randrange(3, 199) for _ in range(24)]
    own = [[rng.randrange(3, 199) for _ in range(length)] for length in (1, 9, 30, 70, 17, 40)]
    prompts = [shared + tail if index % 2 else tail for index, tail in enumerate(own)]
    prompts_as_ids = [{"prompt_token_ids": prompt} for prompt in prompts]
    for setting, options in SETTINGS.items():
        with Engine(str(folder), dtype="float32", skip_tokenizer_init=True, **options) as engine:
            writers = [engine.submit(shared[: 5 + i], WRITING) for i in range(2)]
            engine.step()
            for pooling in ("mean", "last"):
                expected = vectors_of(model, prompts, pooling)
                outputs = engine.embed(prompts_as_ids, pooling=pooling, normalize=False)
                found = as_tensor([output.embedding for output in outputs])
                scale = expected.abs().max()
                assert (found - expected).abs().max() < TOLERANCE * scale, f"{pooling}, {setting}"
                again = engine.embed(prompts_as_ids, pooling=pooling)
                unit = expected / expected.norm(dim=1, keepdim=True)
                assert (as_tensor([o.embedding for o in again]) - unit).abs().max() < TOLERANCE
            assert [len(writer.result().outputs[0].token_ids) for writer in writers] == [60, 60]
            stats = engine.stats()
            assert stats.used_blocks == 0
            if "preempted" in setting:
                assert stats.preemptions > 0, "the pool was not small enough to show anything"


def test_a_model_that_runs_through_transformers_gives_the_same_vectors(
    make_model: Callable[..., tuple[Any, Path]],
) -> None:
    model, folder = make_model("LlamaForCausalLM")
    prompts = [[5, 6, 7], list(range(10, 40))]
    with Engine(str(folder), model_impl="transformers", dtype="float32", skip_tokenizer_init=True) as engine:
        outputs = engine.embed([{"prompt_token_ids": p} for p in prompts], normalize=False)
    difference = as_tensor([o.embedding for o in outputs]) - vectors_of(model, prompts, "mean")
    assert difference.abs().max() < TOLERANCE
