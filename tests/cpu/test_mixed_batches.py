"""The same request gives the same tokens natively, whatever else is in the batch and however its prompt is cut."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvpage import Engine, SamplingParams
from kvpage.outputs import RequestOutput
from tiny_checkpoint import write_checkpoint

MIXED_STEPS = 1000
"""Steps with more than one row that a storm has at least."""
WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 16,
    "num_attention_heads": 6,
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int8-weight-only": {"dtype": "bfloat16", "quantization": "int8-weight-only"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "int8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}


def requests(count: int, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 150 tokens, a third of which begin alike; greedy and drawn by turns."""
    rng = random.Random(7)
    shared = [rng.randrange(5, vocab) for _ in range(70)]
    made = []
    for index in range(count):
        prompt = [rng.randrange(5, vocab) for _ in range(rng.choice((1, 2, 7, 31, 64, 80)))]
        params = SamplingParams(
            temperature=0.0 if index % 2 else 0.8, top_p=0.95, seed=index, max_tokens=rng.randint(8, 40),
            ignore_eos=True, detokenize=False,
        )  # fmt: skip
        made.append((shared + prompt if index % 3 == 0 else prompt, params))
    return made


def tokens_of(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_the_same_tokens_alone_and_in_a_thousand_mixed_batches(
    kind: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", **WIDTHS)
    options = {"skip_tokenizer_init": True, "max_model_len": 256, **KINDS[kind]}
    with Engine(str(folder), max_num_seqs=1, **options) as engine:
        assert engine.config.decoder_backend == "cpu"
        wanted = requests(24, 300)
        alone = []
        for prompt, params in wanted:
            engine.reset_prefix_cache()
            alone.append(
                tokens_of(engine.generate([{"prompt_token_ids": prompt}], params, progress=False)[0])
            )
    assert len({tuple(tokens) for tokens in alone}) > 20, "the model says too little to tell requests apart"
    rng = random.Random(11)
    mixed = 0
    # Budgets that cut prompts anywhere, and a pool in which sequences are preempted.
    cut: dict[str, Any] = {"max_num_batched_tokens": 48}
    squeezed: dict[str, Any] = {"max_num_batched_tokens": 300, "num_kv_blocks": 24, "block_size": 16}
    for settings in (cut, squeezed):
        with Engine(str(folder), max_num_seqs=12, **options, **settings) as engine:
            steps = 0
            while steps < MIXED_STEPS // 2:
                order = rng.sample(range(len(wanted)), len(wanted))
                open_requests = {}
                while order or open_requests:
                    for _ in range(min(len(order), rng.choice((0, 0, 1, 2, 5)))):
                        index = order.pop()
                        prompt, params = wanted[index]
                        open_requests[index] = engine.submit({"prompt_token_ids": prompt}, params)
                    engine.step()
                    steps += engine.stats().running > 1
                    for index in [i for i, handle in open_requests.items() if handle.done]:
                        assert tokens_of(open_requests.pop(index).result()) == alone[index], (
                            f"request {index}"
                        )
            assert engine.stats().prefix_hits > 0
            assert (engine.stats().preemptions > 0) == (settings is squeezed)
            mixed += steps
    assert mixed >= MIXED_STEPS
