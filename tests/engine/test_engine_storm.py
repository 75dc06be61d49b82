"""Random load, aborts and timeouts: every choice ends exactly once, and no block is lost."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from engine_state import MakeEngine

from kvpage import SamplingParams

STOPS = ["e", "a", "ed", "th", " ", "ck", "\ufffd\ufffd\ufffd"]


def random_params(rng: random.Random) -> SamplingParams:
    n = rng.choice([1, 1, 1, 2, 3, 5])
    return SamplingParams(
        n=n,
        temperature=rng.choice([0.7, 1.0, 2.0]) if n > 1 else rng.choice([0.0, 1.0]),
        max_tokens=rng.choice([1, 2, 9, 30]),
        min_tokens=rng.choice([0, 0, 1]),
        stop=rng.sample(STOPS, rng.choice([0, 0, 1, 3])),
        include_stop_str_in_output=rng.random() < 0.3,
        stop_token_ids=rng.sample(range(380), rng.choice([0, 0, 20])),
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(1000),
        timeout=rng.choice([None, None, None, 0.001, 0.05]),
        logprobs=rng.choice([None, None, 1]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
        repetition_penalty=rng.choice([None, 1.2]),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 24, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 24},
        {"num_kv_blocks": 80, "block_size": 1, "max_num_seqs": 32, "scheduling_policy": "priority"},
    ],
    ids=["small blocks, short steps", "blocks of one token, priorities"],
)
def test_every_choice_of_a_storm_ends_once_and_no_block_is_lost(
    make_engine: MakeEngine, options: dict[str, Any]
) -> None:
    rng = random.Random(17)
    engine = make_engine(**options)
    shared = [rng.randrange(5, 380) for _ in range(20)]
    handles = []
    ends: Counter[tuple[str, int]] = Counter()
    texts: Counter[tuple[str, int]] = Counter()

    def read(handle: Any) -> None:
        for event in handle.events():
            assert ends[handle.request_id, event.index] == 0, "nothing comes after the end"
            ends[handle.request_id, event.index] += event.finish_reason is not None
            texts[handle.request_id, event.index] += len(event.delta)

    while len(handles) < 300 or engine.stats().running or engine.stats().waiting:
        for _ in range(rng.choice([0, 1, 4]) if len(handles) < 300 else 0):
            prompt = shared[: rng.randrange(20)] + [
                rng.randrange(5, 380) for _ in range(rng.randrange(1, 20))
            ]
            handles.append(engine.submit(prompt, random_params(rng), priority=rng.randrange(3)))
        if rng.random() < 0.15:
            rng.choice(handles).cancel() if handles else None
        engine.step()
        if rng.random() < 0.1:
            engine._core.scheduler.check()
        for handle in rng.sample(handles, min(4, len(handles))):
            read(handle)
    for handle in handles:
        read(handle)
        for choice in handle.result().outputs:
            key = handle.request_id, choice.index
            assert ends[key] == 1
            assert texts[key] == len(choice.text)
            assert choice.finish_reason in ("stop", "length", "abort")
    stats = engine.stats()
    reasons = Counter(choice.finish_reason for handle in handles for choice in handle.output.outputs)
    assert min(reasons[reason] for reason in ("stop", "length", "abort")) > 5, "the storm met every end"
    assert stats.preemptions > 0
    assert stats.free_blocks == stats.total_blocks
    assert stats.finished_requests == len(handles)
    assert engine.reset_prefix_cache()
