"""What each step of the sampler does to a row: bias, penalties, forbidden and allowed tokens, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from kvpage import SamplingParams
from kvpage.api.sampling import SamplingEnv
from kvpage.errors import RequestError
from kvpage.sample.draw import TorchSampling
from kvpage.sample.sampler import Sampled, Sampler

VOCAB = 50
EOS = 2


def sampler() -> Sampler:
    return Sampler(
        vocab_size=VOCAB,
        num_slots=8,
        eos_token_ids=[EOS],
        processors={},
        kernel=TorchSampling(SamplingEnv("cpu", VOCAB)),
    )


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=None, **{"temperature": 0.0, **fields}).with_defaults({})


def admitted(
    asked: SamplingParams, prompt: Sequence[int] = (5, 6, 7), output: Sequence[int] = (), **more: Any
) -> Sampler:
    made = sampler()
    made.admit(0, asked, seed=1, stream=0, token_ids=[*prompt, *output], prompt_length=len(prompt), **more)
    return made


def step(made: Sampler, logits: torch.Tensor) -> Sampled:
    return made.sample(logits.clone().reshape(1, -1), np.array([0]))


def greedy_run(made: Sampler, logits: torch.Tensor, steps: int) -> list[int]:
    """Tokens of several steps on the same logits: what changes is the slot's state."""
    return [step(made, logits).token_ids[0] for _ in range(steps)]


def random_row(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def falling(*first: int) -> torch.Tensor:
    """Logits whose likeliest tokens are ``first``, in that order."""
    logits = torch.full((VOCAB,), -10.0)
    for rank, token in enumerate(first):
        logits[token] = 10.0 - rank
    return logits


def test_plain_greedy_takes_the_likeliest_token() -> None:
    assert step(admitted(params()), falling(4, 9)).token_ids == [4]


def test_logit_bias_is_added() -> None:
    assert step(admitted(params(logit_bias={9: 1.5, 4: -0.1})), falling(4, 9)).token_ids == [9]
    assert step(admitted(params(logit_bias={9: 0.5})), falling(4, 9)).token_ids == [4]


def test_only_allowed_tokens_are_chosen() -> None:
    assert step(admitted(params(allowed_token_ids=[9, 3])), falling(4, 8, 3, 9)).token_ids == [3]
    drawing = admitted(params(temperature=5.0, allowed_token_ids=[9, 3]))
    assert set(greedy_run(drawing, torch.zeros(VOCAB), 40)) == {3, 9}


def test_min_tokens_forbids_eos_and_stop_tokens_until_then() -> None:
    made = admitted(params(min_tokens=2, stop_token_ids=[4]))
    assert greedy_run(made, falling(EOS, 4, 9), 4) == [9, 9, EOS, EOS]


def test_min_tokens_counts_generated_tokens_not_the_prompt() -> None:
    made = admitted(params(min_tokens=3), prompt=(1, 1, 1, 1, 1), output=(9, 9))
    assert greedy_run(made, falling(EOS, 9), 2) == [9, EOS]


def test_ignore_eos_does_not_forbid_eos() -> None:
    assert step(admitted(params(ignore_eos=True)), falling(EOS, 4)).token_ids == [EOS]


def test_a_bad_word_of_one_token_never_comes() -> None:
    assert greedy_run(admitted(params(), bad_word_ids=[[4]]), falling(4, 9), 3) == [9, 9, 9]


def test_a_longer_bad_word_is_stopped_at_its_last_token() -> None:
    # 7 is forbidden only right after 4, 7 being likeliest; 9 comes instead and the beginning is forgotten.
    made = admitted(params(), bad_word_ids=[[7, 4, 7]])
    tokens = []
    for likeliest in (7, 4, 7, 7, 4, 4, 7):
        tokens.append(step(made, falling(likeliest, 9)).token_ids[0])
    assert tokens == [7, 4, 9, 7, 4, 4, 7]


def test_a_bad_word_must_lie_wholly_in_the_output() -> None:
    made = admitted(params(), prompt=(5, 7), bad_word_ids=[[7, 4]])
    assert step(made, falling(4, 9)).token_ids == [4]


def test_bad_words_forbid_what_transformers_forbids() -> None:
    words = [[3], [4, 5], [5, 5], [4, 5, 6], [9, 4, 5, 7], [6, 6, 6, 6]]
    oracle = NoBadWordsLogitsProcessor(words)
    rng = np.random.default_rng(0)
    for _ in range(60):
        output = rng.integers(3, 10, rng.integers(1, 7)).tolist()
        logits = random_row(int(rng.integers(1000)))
        expected = oracle(torch.tensor([output]), logits.clone().reshape(1, -1))
        bias = {int(token): 40.0 for token in (3, 5, 6, 7)}  # make forbidden tokens the ones that would win
        for token, value in bias.items():
            expected[0, token] += value
        made = admitted(params(logit_bias=bias), output=output, bad_word_ids=words)
        assert step(made, logits).token_ids == [int(expected.argmax())]


def test_repetition_penalty_is_that_of_transformers() -> None:
    for penalty in (1.3, 0.6):
        oracle = RepetitionPenaltyLogitsProcessor(penalty)
        made = admitted(params(repetition_penalty=penalty), prompt=(5, 6, 7, 7, 8))
        known = [5, 6, 7, 7, 8]
        for index in range(30):
            logits = random_row(index)
            expected = int(oracle(torch.tensor([known]), logits.clone().reshape(1, -1)).argmax())
            assert step(made, logits).token_ids == [expected]
            known.append(expected)


def test_frequency_and_presence_penalties_follow_openais_formula() -> None:
    made = admitted(params(frequency_penalty=0.7, presence_penalty=0.4), prompt=(5, 6, 7))
    counts: Counter[int] = Counter()  # of the output only
    for index in range(40):
        logits = random_row(index % 3)
        expected = logits.clone()
        for token, count in counts.items():
            expected[token] -= count * 0.7 + 0.4
        chosen = int(expected.argmax())
        assert step(made, logits).token_ids == [chosen]
        counts[chosen] += 1
    assert max(counts.values()) > 1


def test_all_three_penalties_together_look_at_prompt_and_output_each_in_its_way() -> None:
    prompt, output = [5, 6, 7, 8, 9, 10], list[int]()
    made = admitted(
        params(repetition_penalty=1.2, frequency_penalty=-0.3, presence_penalty=0.9), prompt=prompt
    )
    oracle = RepetitionPenaltyLogitsProcessor(1.2)
    for index in range(60):
        logits = random_row(index % 7)
        logits[prompt] += 1.0
        expected = oracle(torch.tensor([[*prompt, *output]]), logits.clone().reshape(1, -1))[0]
        for token, count in Counter(output).items():
            expected[token] += count * 0.3 - 0.9
        output.append(int(expected.argmax()))
        assert step(made, logits).token_ids == output[-1:]
    assert set(output) & set(prompt)
    assert set(output) - set(prompt)


def test_penalties_see_many_distinct_tokens() -> None:
    made = admitted(params(presence_penalty=2.0))
    logits = torch.linspace(1.0, 0.0, VOCAB)  # every token within the penalty of every other: each comes once
    assert greedy_run(made, logits, VOCAB) == list(range(VOCAB))


def test_bias_comes_before_penalties() -> None:
    # 4: (1 + 3) / 2 = 2 loses to 9's 2.5 ; penalised first it would be 0.5 + 3 = 3.5 and win.
    logits = torch.full((VOCAB,), -10.0)
    logits[4], logits[9] = 1.0, 2.5
    assert step(
        admitted(params(logit_bias={4: 3.0}, repetition_penalty=2.0), prompt=(4,)), logits
    ).token_ids == [9]


@pytest.mark.parametrize(
    ("name", "fields", "more"),
    [
        ("logit_bias", {"logit_bias": {VOCAB: 1.0}}, {}),
        ("allowed_token_ids", {"allowed_token_ids": [1, VOCAB + 3]}, {}),
        ("stop_token_ids", {"stop_token_ids": [VOCAB]}, {}),
        ("bad_words", {}, {"bad_word_ids": [[1, VOCAB]]}),
        ("prompt", {"repetition_penalty": 1.1}, {"token_ids": [VOCAB], "prompt_length": 1}),
    ],
)
def test_token_ids_out_of_the_vocabulary_are_refused_by_name(
    name: str,
    fields: dict[str, Any],
    more: dict[str, Any],
) -> None:
    made = sampler()
    with pytest.raises(RequestError, match=rf"{name} has token id .*vocabulary has {VOCAB} tokens") as caught:
        made.admit(
            0, params(**fields), **{"seed": 1, "stream": 0, "token_ids": [1], "prompt_length": 1, **more}
        )
    assert caught.value.param == name


def test_logprobs_are_the_models_own_whatever_steps_change() -> None:
    logits = random_row(4)
    expected = logits.log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    made = admitted(params(logprobs=3, logit_bias={order[10]: 100.0}, frequency_penalty=1.0))
    sampled = step(made, logits)
    assert sampled.token_ids == [order[10]]
    assert sampled.logprobs is not None
    mapping = sampled.logprobs[0]
    assert mapping is not None
    assert list(mapping) == [order[10], *order[:3]]
    assert [entry.rank for entry in mapping.values()] == [11, 1, 2, 3]
    for token, entry in mapping.items():
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-6)
        assert entry.decoded_token is None


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (5, 5), (-1, VOCAB), (VOCAB + 9, VOCAB)])
def test_as_many_logprobs_come_as_were_asked_for(count: int, size: int) -> None:
    sampled = step(admitted(params(logprobs=count)), random_row())
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] is not None
    assert len(sampled.logprobs[0]) == size


def test_equal_tokens_have_equal_ranks() -> None:
    made = admitted(params(logprobs=4))
    logits = torch.full((VOCAB,), -5.0)
    logits[[3, 8, 11]] = torch.tensor([2.0, 1.0, 1.0])
    sampled = step(made, logits)
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] is not None
    ranks = {token: entry.rank for token, entry in sampled.logprobs[0].items()}
    assert [ranks.pop(token) for token in (3, 8, 11)] == [1, 2, 2]
    assert list(ranks.values()) == [4]


def test_only_rows_that_asked_get_logprobs() -> None:
    made = sampler()
    for slot, asked in enumerate((params(), params(logprobs=2), params(logprobs=0))):
        made.admit(slot, asked, seed=0, stream=0, token_ids=[1], prompt_length=1)
    rows = torch.stack([random_row(seed) for seed in range(3)])
    sampled = made.sample(rows.clone(), np.array([2, 0, 1]))
    assert sampled.logprobs is not None
    assert [None if mapping is None else len(mapping) for mapping in sampled.logprobs] == [1, None, 2]
    assert made.sample(rows.clone()[:1], np.array([0])).logprobs is None


def test_prompt_logprobs_report_the_token_that_came_next() -> None:
    logits = torch.stack([random_row(seed) for seed in range(20)])
    tokens = [(7 * index) % VOCAB for index in range(20)]
    expected = logits.log_softmax(-1)
    for row, mapping in enumerate(sampler().prompt_logprobs(logits.clone(), tokens, 2)):
        assert next(iter(mapping)) == tokens[row]
        assert mapping[tokens[row]].logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-6)
        assert {entry.rank for entry in mapping.values()} >= {1, 2}
        assert mapping[tokens[row]].rank == 1 + int((expected[row] > expected[row, tokens[row]]).sum())


def test_a_step_that_leaves_no_token_is_an_error_of_that_row() -> None:
    sampled = step(admitted(params(allowed_token_ids=[EOS], min_tokens=1)), falling(EOS, 4))
    assert sampled.token_ids == [0]
    assert "every token is forbidden" in sampled.errors[0]
    assert (
        "NaN"
        in step(
            admitted(params(temperature=1.0)), random_row().index_fill(0, torch.tensor([3]), math.nan)
        ).errors[0]
    )
    assert (
        "+inf"
        in step(
            admitted(params(temperature=1.0)), random_row().index_fill(0, torch.tensor([3]), math.inf)
        ).errors[0]
    )
