"""Checkpoints written by the tools themselves: every position's distribution, through a whole engine, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvpage import Engine, SamplingParams

DATA = Path(__file__).parent.parent / "data" / "quant"


def whole_models() -> list[str]:
    """Vectors that hold a whole model, and its logits."""
    found = []
    for folder in sorted(DATA.iterdir()):
        oracle = folder / "oracle.npz"
        if oracle.is_file() and "logits" in np.load(oracle).files:
            found.append(folder.name)
    return found


def model_path(name: str) -> Path:
    files = list((DATA / name).glob("*.gguf"))
    return files[0] if files else DATA / name


@pytest.mark.parametrize("decoder", ["cpu", "torch"])
@pytest.mark.parametrize("name", whole_models())
def test_logits_are_those_of_the_dequantized_weights(name: str, decoder: str) -> None:
    oracle = np.load(DATA / name / "oracle.npz")
    expected = torch.from_numpy(oracle["logits"])[0].log_softmax(-1)
    ids = [int(token) for token in oracle["input_ids"][0]]
    vocab = expected.shape[1]
    with Engine(
        model_path(name),
        dtype="float32",
        decoder_backend=decoder,
        skip_tokenizer_init=True,
        num_kv_blocks=16,
        max_logprobs=vocab,
    ) as engine:
        asked = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=vocab, logprobs=vocab, detokenize=False
        )
        (answer,) = engine.generate([{"prompt_token_ids": ids}], asked, progress=False)
    assert answer.prompt_logprobs is not None
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    for position, row in enumerate(rows):
        got = torch.tensor([row[token].logprob for token in range(vocab)])
        assert (got - expected[position]).abs().max() < 1e-4, f"position {position}"
