"""What sampling parameters do end to end; transformers is the oracle where it can be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from engine_state import MakeEngine

from kvpage import Engine, RequestError, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
PROMPT = "The block pool hands"


def choices(output: RequestOutput) -> list[list[int]]:
    return [choice.token_ids for choice in output.outputs]


def test_a_seed_repeats_whatever_runs_beside_it(engine: Engine) -> None:
    seeded = SAMPLED.clone(seed=7)
    (alone,) = engine.generate(PROMPT, seeded)
    crowd = engine.generate(
        ["Paged", PROMPT, "and", PROMPT], [SAMPLED, seeded, SAMPLED, SAMPLED.clone(seed=8)]
    )
    assert choices(crowd[1]) == choices(alone)
    assert choices(crowd[3]) != choices(alone)


def test_an_engine_seed_repeats_requests_in_their_order(make_engine: MakeEngine) -> None:
    first, second = (
        [choices(o) for o in make_engine(seed=3).generate([PROMPT] * 3, SAMPLED)] for _ in range(2)
    )
    other = [choices(o) for o in make_engine(seed=4).generate([PROMPT] * 3, SAMPLED)]
    assert first == second != other
    assert len({str(tokens) for tokens in first}) == 3, "each request has noise of its own"


def test_without_a_seed_no_two_engines_agree(make_engine: MakeEngine) -> None:
    first, second = (choices(make_engine().generate(PROMPT, SAMPLED)[0]) for _ in range(2))
    assert first != second


LONG = list(range(10, 110))
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "in steps of 16 tokens": {"max_num_batched_tokens": 16},
    "in a pool that preempts": {"num_kv_blocks": 24, "block_size": 8},
    "more choices than slots": {"max_num_seqs": 3},
    "one slot": {"max_num_seqs": 1},
    "without a prefix cache": {"enable_prefix_caching": False},
}


def test_seeded_choices_are_the_same_in_every_setting(make_engine: MakeEngine) -> None:
    params = SAMPLED.clone(n=6, seed=11, max_tokens=24)
    found = {
        name: make_engine(**options).generate([LONG, LONG[:50]], params) for name, options in SETTINGS.items()
    }
    expected = [choices(output) for output in found["alone"]]
    assert len({tuple(tokens) for tokens in expected[0]}) == 6
    for name, outputs in found.items():
        assert [choices(output) for output in outputs] == expected, name


def test_choices_use_the_blocks_of_their_prompt_once(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=16)
    handle = engine.submit(LONG, SAMPLED.clone(n=4, seed=1, max_tokens=20))
    engine.step()
    prompt_blocks = -(-len(LONG) // 16)
    forked = engine.stats()
    assert (forked.running, forked.forks) == (4, 3)
    assert forked.used_blocks == prompt_blocks, "nothing is written yet that differs"
    engine.step()
    apart = engine.stats()
    # The six full blocks stay shared; the last one, partly filled, is copied once a fork.
    assert apart.used_blocks == prompt_blocks + 3
    assert apart.copies == 3 == apart.forks
    (group,) = engine.inspect().groups
    assert sum(len(block.owners) == 4 for block in group.blocks) == len(LONG) // 16
    output = handle.result()
    assert len(output.outputs) == 4
    assert engine.stats().copies <= engine.stats().forks


def test_more_choices_than_slots_all_come(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    (output,) = engine.generate(PROMPT, SAMPLED.clone(n=7, seed=1))
    assert [choice.index for choice in output.outputs] == list(range(7))
    assert [choice.finish_reason for choice in output.outputs] == ["length"] * 7


def oracle_tokens(oracle: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=None,
        pad_token_id=0, **options,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_the_repetition_penalty_is_transformers(engine: Engine, oracle: Any) -> None:
    prompt = LONG[:30]
    for penalty in (0.7, 1.3, 2.5):
        (output,) = engine.generate(prompt, GREEDY.clone(max_tokens=30, repetition_penalty=penalty))
        assert output.outputs[0].token_ids == oracle_tokens(oracle, prompt, repetition_penalty=penalty)


def test_bad_words_and_allowed_tokens_are_heeded(engine: Engine, oracle: Any) -> None:
    (plain,) = engine.generate(PROMPT, GREEDY)
    assert engine.tokenizer is not None
    word = engine.tokenizer.decode(plain.outputs[0].token_ids[2:4]).strip("\ufffd")
    assert word in plain.outputs[0].text
    (clean,) = engine.generate(PROMPT, GREEDY.clone(bad_words=[word]))
    assert word not in clean.outputs[0].text
    allowed = [40, 41, 42, 300]
    (narrow,) = engine.generate(PROMPT, GREEDY.clone(allowed_token_ids=allowed))
    assert set(narrow.outputs[0].token_ids) <= set(allowed)
    ids = list(plain.prompt_token_ids)
    banned = oracle_tokens(
        oracle, ids, suppress_tokens=[t for t in range(oracle.config.vocab_size) if t not in allowed]
    )
    assert narrow.outputs[0].token_ids == banned[:16]


def test_a_bias_forces_and_forbids(engine: Engine) -> None:
    (forced,) = engine.generate(PROMPT, GREEDY.clone(logit_bias={77: 100.0}))
    assert forced.outputs[0].token_ids == [77] * 16
    (plain,) = engine.generate(PROMPT, GREEDY)
    token = plain.outputs[0].token_ids[0]
    (without,) = engine.generate(PROMPT, GREEDY.clone(logit_bias={token: -100.0}))
    assert token not in without.outputs[0].token_ids


def test_penalties_make_repetition_rare(engine: Engine) -> None:
    biased = GREEDY.clone(logit_bias={77: 4.0, 78: 4.0}, max_tokens=30)
    (plain,) = engine.generate(PROMPT, biased)
    (penalised,) = engine.generate(PROMPT, biased.clone(frequency_penalty=2.0, presence_penalty=2.0))
    count = [tokens.count(77) + tokens.count(78) for tokens in (*choices(plain), *choices(penalised))]
    assert count[1] < count[0]


def expected_logprobs(oracle: Any, tokens: list[int]) -> torch.Tensor:
    """float64 [len, V]: row i is the distribution of token i + 1."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), -1)


def test_logprobs_are_those_of_the_model(engine: Engine, oracle: Any) -> None:
    (output,) = engine.generate(PROMPT, SAMPLED.clone(seed=5, logprobs=3))
    choice = output.outputs[0]
    prompt = list(output.prompt_token_ids)
    rows = expected_logprobs(oracle, prompt + choice.token_ids)[len(prompt) - 1 : -1]
    assert choice.logprobs is not None
    assert engine.tokenizer is not None
    for row, token, position in zip(rows, choice.token_ids, choice.logprobs, strict=True):
        top = torch.topk(row, 3).indices.tolist()
        assert set(position) == {token, *top}
        for candidate, value in position.items():
            assert value.logprob == pytest.approx(row[candidate].item(), abs=1e-4)
            assert value.rank == 1 + int((row > row[candidate]).sum())
            assert value.decoded_token == engine.tokenizer.token_text(candidate)
    total = sum(p[t].logprob for p, t in zip(choice.logprobs, choice.token_ids, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)


def test_logprobs_travel_with_their_tokens_in_a_stream(engine: Engine) -> None:
    params = SAMPLED.clone(seed=5, logprobs=1)
    (whole,) = engine.generate(PROMPT, params)
    events = list(engine.stream(PROMPT, params))
    assert all(event.logprobs is not None and len(event.logprobs) == len(event.token_ids) for event in events)
    streamed = list(itertools.chain.from_iterable(event.logprobs or () for event in events))
    assert streamed == whole.outputs[0].logprobs


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7}], ids=["at once", "in chunks"])
def test_prompt_logprobs_are_those_of_the_model(
    make_engine: MakeEngine, oracle: Any, options: dict[str, Any]
) -> None:
    engine = make_engine(**options)
    prompt = LONG[:40]
    for _ in range(2):  # the second time the prefix cache could serve it
        (output,) = engine.generate(prompt, GREEDY.clone(prompt_logprobs=2, max_tokens=1))
        found = output.prompt_logprobs
        assert found is not None
        assert found[0] is None
        rows = expected_logprobs(oracle, prompt)
        for row, token, position in zip(rows[:-1], prompt[1:], found[1:], strict=True):
            assert position is not None
            assert position[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert len(position) in (2, 3)
            assert position[token].decoded_token is not None


def test_all_logprobs_need_an_engine_without_a_limit(make_engine: MakeEngine) -> None:
    with pytest.raises(RequestError, match="asks for all, more than max_logprobs=20") as caught:
        make_engine().generate(PROMPT, GREEDY.clone(logprobs=-1))
    assert caught.value.param == "logprobs"
    engine = make_engine(max_logprobs=-1)
    (output,) = engine.generate(PROMPT, GREEDY.clone(logprobs=-1, max_tokens=1))
    assert output.outputs[0].logprobs is not None
    (position,) = output.outputs[0].logprobs
    assert sum(2.718281828459045**value.logprob for value in position.values()) == pytest.approx(1.0)
