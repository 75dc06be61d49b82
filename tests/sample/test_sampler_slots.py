"""A slot's tokens depend on its request alone: not on the batch, the slot, forks beside it, preemption or failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpage import SamplingParams
from kvpage.api.sampling import LogitsProcessor, SamplingEnv
from kvpage.errors import RequestError
from kvpage.sample.draw import TorchSampling
from kvpage.sample.sampler import Sampler

VOCAB = 64
SLOTS = 16


class Recorder(LogitsProcessor):
    """Forbids what its slot generated before, and writes down every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.seen: dict[int, list[int]] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        if params.extra_args.get("refuse"):
            raise RequestError("refused")
        self.calls.append(("admit", slot, tuple(prompt_ids)))
        self.seen[slot] = []

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        self.calls.append(("apply", tuple(slots), logits.dtype))
        for row, slot in zip(logits, slots, strict=True):
            row[self.seen[slot]] = -math.inf
        return logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.calls.append(("advance", slot, tuple(token_ids)))
        self.seen[slot] += token_ids

    def release(self, slot: int) -> None:
        self.calls.append(("release", slot))
        del self.seen[slot]


class KeepsArgmax(Recorder):
    keeps_argmax = True


class Failing(LogitsProcessor):
    """Raises in the method it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        pass

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        if self.where == "apply":
            raise KeyError("lost")
        return logits[:, :-1] if self.where == "shape" else logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        if self.where == "advance":
            raise KeyError("lost")

    def release(self, slot: int) -> None:
        if self.where == "release":
            raise KeyError("lost")


def sampler(**processors: Callable[[], LogitsProcessor]) -> Sampler:
    return Sampler(
        vocab_size=VOCAB,
        num_slots=SLOTS,
        eos_token_ids=[2],
        processors={"seen": Recorder, **processors},
        kernel=TorchSampling(SamplingEnv("cpu", VOCAB)),
    )


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=None, **fields).with_defaults({})


def logits_after(known: Sequence[int]) -> torch.Tensor:
    """A stand-in for the model: logits [V] that depend on the known tokens alone."""
    seed = hash(tuple(known)) % 2**31
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


@dataclass
class Request:
    params: SamplingParams
    seed: int
    stream: int
    known: list[int]
    prompt_length: int
    bad_word_ids: Sequence[Sequence[int]] = ()

    def admit(self, made: Sampler, slot: int) -> None:
        made.admit(
            slot,
            self.params,
            seed=self.seed,
            stream=self.stream,
            token_ids=self.known,
            prompt_length=self.prompt_length,
            bad_word_ids=self.bad_word_ids,
        )

    def copy(self) -> Request:
        return Request(
            self.params, self.seed, self.stream, list(self.known), self.prompt_length, self.bad_word_ids
        )


def advance(made: Sampler, running: dict[int, Request]) -> None:
    """One step of some slots, in the order of the dictionary."""
    rows = torch.stack([logits_after(sequence.known) for sequence in running.values()])
    sampled = made.sample(rows, np.array(list(running)))
    assert sampled.errors == {}
    for sequence, token in zip(running.values(), sampled.token_ids, strict=True):
        sequence.known.append(token)


def alone(sequence: Request, steps: int) -> list[int]:
    twin, made = sequence.copy(), sampler()
    twin.admit(made, 0)
    for _ in range(steps):
        advance(made, {0: twin})
    return twin.known


some_params = st.builds(
    params,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 2.5]),
    top_k=st.sampled_from([0, 3, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 3]),
    logit_bias=st.sampled_from([None, {3: 2.0, 9: -5.0}]),
    allowed_token_ids=st.sampled_from([None, list(range(1, 40))]),
    logits_processors=st.sampled_from([(), ("seen",)]),
    logprobs=st.sampled_from([None, 2]),
)
some_sequences = st.builds(
    lambda asked, seed, stream, prompt, words: Request(asked, seed, stream, prompt, len(prompt), words),
    some_params,
    st.integers(0, 2**64 - 1),
    st.integers(0, 9),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    st.sampled_from([(), ((5,), (7, 8))]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(some_sequences, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_tokens_depend_on_the_request_alone(sequences: list[Request], random: Any) -> None:
    """Any batch order, batch mates, slots and preemptions give what the sequence gives alone."""
    expected = [alone(sequence, 6) for sequence in sequences]
    made = sampler()
    free = random.sample(range(SLOTS), SLOTS)
    running: dict[int, Request] = {}
    for sequence in sequences:
        slot = free.pop()
        sequence.admit(made, slot)
        running[slot] = sequence
    while running:
        chosen = random.sample(list(running), random.randint(1, len(running)))
        advance(made, {slot: running[slot] for slot in chosen})
        for slot in chosen:
            sequence = running[slot]
            done = len(sequence.known) - sequence.prompt_length == 6
            if done or random.random() < 0.3:  # the end, or a preemption and a new slot
                made.release(slot)
                del running[slot]
                free.insert(0, slot)
                if not done:
                    running[free[-1]] = sequence
                    sequence.admit(made, free.pop())
    assert [sequence.known for sequence in sequences] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
        {"logits_processors": ["seen"]},
        {"min_tokens": 5},
    ],
    ids=str,
)
def test_a_fork_goes_on_as_a_sequence_of_its_own_stream(fields: dict[str, Any]) -> None:
    parent = Request(params(**fields), 77, 0, [1, 2, 3], 3, ((9,), (4, 5)))
    made = sampler()
    parent.admit(made, 4)
    for _ in range(3):
        advance(made, {4: parent})
    child = parent.copy()
    child.stream = 1
    expected_parent, expected_child = alone(parent.copy(), 5), alone(child, 5)
    made.fork(4, 9, stream=1)
    for _ in range(5):
        advance(made, {9: child, 4: parent})
    assert parent.known == expected_parent
    assert child.known == expected_child
    assert parent.known != child.known


def test_a_forks_bad_words_begin_with_its_own_tokens() -> None:
    made = sampler()
    made.admit(
        0, params(temperature=0.0), seed=0, stream=0, token_ids=[1], prompt_length=1, bad_word_ids=[[4, 5]]
    )
    made.fork(0, 1, stream=1)
    likeliest = torch.zeros(2, VOCAB)
    likeliest[0, 4] = likeliest[1, 6] = 1.0
    assert made.sample(likeliest.clone(), np.array([0, 1])).token_ids == [4, 6]
    likeliest[:, 5] = 2.0
    assert made.sample(likeliest.clone(), np.array([1, 0])).token_ids == [5, 6]


def test_streams_of_one_seed_are_independent() -> None:
    runs = {tuple(alone(Request(params(), 5, stream, [1], 1), 8)) for stream in range(20)}
    assert len(runs) == 20


def test_a_seed_repeats_its_tokens_and_another_does_not() -> None:
    first, again, other = (alone(Request(params(), seed, 0, [1], 1), 12) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_bfloat16_logits_are_sampled_as_their_float32_values() -> None:
    rows = torch.stack([logits_after([index]) for index in range(6)]).bfloat16()
    tokens = []
    for logits in (rows.clone(), rows.float()):
        made = sampler()
        for slot in range(6):
            fields: dict[str, Any] = [{"temperature": 0}, {"top_p": 0.8}, {"presence_penalty": 1.0}][slot % 3]
            made.admit(slot, params(**fields), seed=slot, stream=0, token_ids=[1], prompt_length=1)
        tokens.append(made.sample(logits, np.arange(6)).token_ids)
    assert tokens[0] == tokens[1]


def test_a_released_slot_leaves_nothing_to_the_next_request() -> None:
    made = sampler()
    heavy = Request(
        params(
            temperature=0.5,
            top_k=2,
            presence_penalty=2.0,
            logprobs=1,
            min_tokens=9,
            logit_bias={5: 50.0},
            logits_processors=["seen"],
        ),
        1,
        0,
        [1],
        1,
        ((3,),),
    )
    heavy.admit(made, 0)
    advance(made, {0: heavy})
    made.release(0)
    made.release(0)
    plain = Request(params(temperature=0.0), 1, 0, [1], 1)
    expected = alone(plain, 4)
    plain.admit(made, 0)
    for _ in range(4):
        advance(made, {0: plain})
    assert plain.known == expected


def test_a_row_of_nan_ends_in_error_alone() -> None:
    made, undisturbed = sampler(), sampler()
    asked = [params(temperature=0.0, logprobs=1), params(), params(top_p=0.7, frequency_penalty=1.0)] * 2
    for each in (made, undisturbed):
        for slot, request in enumerate(asked):
            each.admit(slot, request, seed=slot, stream=0, token_ids=[1], prompt_length=1)
    for _ in range(2):
        rows = torch.stack([logits_after([index]) for index in range(6)])
        expected = undisturbed.sample(rows.clone(), np.arange(6))
        rows[[0, 1, 2], [5, 6, 7]] = math.nan
        found = made.sample(rows, np.arange(6))
        assert set(found.errors) == {0, 1, 2}
        assert all("NaN" in message for message in found.errors.values())
        assert found.token_ids == [0, 0, 0, *expected.token_ids[3:]]
        assert found.logprobs is not None
        assert expected.logprobs is not None
        assert found.logprobs[0] is None
        assert found.logprobs[3] == expected.logprobs[3]


@pytest.mark.parametrize("where", ["apply", "shape", "advance"])
def test_a_processors_failure_ends_the_requests_that_named_it(where: str) -> None:
    made = sampler(failing=lambda: Failing(where))
    for slot in range(4):
        named = ["failing"] if slot % 2 else ["seen"]
        made.admit(
            slot,
            params(temperature=0.0, logits_processors=named),
            seed=0,
            stream=0,
            token_ids=[1],
            prompt_length=1,
        )
    rows = torch.stack([logits_after([index]) for index in range(4)])
    sampled = made.sample(rows.clone(), np.arange(4))
    assert set(sampled.errors) == {1, 3}
    assert all("'failing' failed" in message for message in sampled.errors.values())
    assert sampled.token_ids == [int(rows[0].argmax()), 0, int(rows[2].argmax()), 0]


def test_a_processor_that_fails_to_release_harms_nobody() -> None:
    made = sampler(failing=lambda: Failing("release"))
    made.admit(0, params(logits_processors=["failing"]), seed=0, stream=0, token_ids=[1], prompt_length=1)
    made.release(0)
    made.admit(0, params(), seed=0, stream=0, token_ids=[1], prompt_length=1)
    assert made.sample(torch.zeros(1, VOCAB), np.array([0])).errors == {}


def test_a_processor_hears_of_its_slots_in_the_order_of_its_contract() -> None:
    recorder = Recorder()
    made = sampler(mine=lambda: recorder)
    made.admit(
        3,
        params(temperature=0.0, logits_processors=["mine"]),
        seed=0,
        stream=0,
        token_ids=[1, 2, 8, 9],
        prompt_length=2,
    )
    made.admit(0, params(), seed=0, stream=0, token_ids=[1], prompt_length=1)
    rows = torch.stack([logits_after([index]) for index in range(2)]).half()
    token = made.sample(rows, np.array([0, 3])).token_ids[1]
    made.fork(3, 5, stream=1)
    made.release(3)
    assert recorder.calls == [
        ("admit", 3, (1, 2)),
        ("advance", 3, (8, 9)),
        ("apply", (3,), torch.float32),
        ("advance", 3, (token,)),
        ("admit", 5, (1, 2)),
        ("advance", 5, (8, 9, token)),
        ("release", 3),
    ]


def test_greedy_rows_skip_processors_that_keep_the_argmax() -> None:
    recorder = KeepsArgmax()
    made = sampler(mine=lambda: recorder)
    for slot, temperature in enumerate((0.0, 1.0)):
        made.admit(
            slot,
            params(temperature=temperature, logits_processors=["mine"]),
            seed=0,
            stream=0,
            token_ids=[1],
            prompt_length=1,
        )
    made.sample(torch.zeros(2, VOCAB), np.array([0, 1]))
    assert [call for call in recorder.calls if call[0] == "apply"] == [("apply", (1,), torch.float32)]


def test_processors_are_made_once_and_only_when_named() -> None:
    made_count = []
    made = sampler(counted=lambda: made_count.append(1) or Recorder())  # type: ignore[func-returns-value]
    assert made_count == []
    for slot in range(3):
        made.admit(
            slot, params(logits_processors=["counted"]), seed=0, stream=0, token_ids=[1], prompt_length=1
        )
    assert made_count == [1]


def test_a_processor_that_refuses_a_request_leaves_the_slot_free() -> None:
    recorder = Recorder()
    made = sampler(mine=lambda: recorder)
    with pytest.raises(RequestError, match="refused"):
        made.admit(
            0,
            params(logits_processors=["seen", "mine"], extra_args={"refuse": True}, temperature=0.0),
            seed=0,
            stream=0,
            token_ids=[1],
            prompt_length=1,
        )
    made.admit(0, params(temperature=0.0), seed=0, stream=0, token_ids=[1], prompt_length=1)
    assert made.sample(logits_after([1]).reshape(1, -1), np.array([0])).token_ids == [
        int(logits_after([1]).argmax())
    ]
    assert [call for call in recorder.calls if call[0] == "apply"] == []


def test_an_unknown_processor_is_named_with_those_that_exist() -> None:
    with pytest.raises(RequestError, match=r"no logits processor is named 'sene'; registered: seen"):
        sampler().admit(
            0, params(logits_processors=["sene"]), seed=0, stream=0, token_ids=[1], prompt_length=1
        )
