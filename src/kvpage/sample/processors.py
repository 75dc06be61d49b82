"""The built-in steps that change logits before a token is chosen, and what a slot keeps for them.

Each step touches only the entries it must: it collects (row, token id) pairs of all rows that need it and changes
them in one gather and scatter, so that its cost does not grow with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvpage.errors import RequestError
from kvpage.params import SamplingParams

Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]


class TokenCounts:
    """The distinct tokens that a slot's penalties look at, each with how often the output holds it.

    Args:
        prompt_ids: tokens to look at although the output may not hold them (the repetition penalty's).
        output_ids: tokens generated so far.
    """

    __slots__ = ("_counts", "_ids", "_index")

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        seen, counts = np.unique(np.array(output_ids, dtype=np.int64), return_counts=True)
        silent = np.setdiff1d(np.array(prompt_ids, dtype=np.int64), seen)
        distinct = len(seen) + len(silent)
        # Arrays double when full; entry i of both belongs to the token whose _index is i.
        self._ids = np.zeros(2 * distinct + 16, dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._ids[:distinct] = np.concatenate((seen, silent))
        self._counts[: len(seen)] = counts
        self._index = {token: place for place, token in enumerate(self._ids[:distinct].tolist())}

    @property
    def ids(self) -> Int64Array:
        """Distinct tokens [K], in no particular order."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Float32Array:
        """How often the output holds each of ``ids`` [K]; 0 for a token of the prompt alone."""
        return self._counts[: len(self._index)]

    def add(self, token: int) -> None:
        """The output grew by ``token``."""
        place = self._index.get(token)
        if place is None:
            place = self._index[token] = len(self._index)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[place] = token
        self._counts[place] += 1

    def copy(self) -> TokenCounts:
        """The same counts, to grow apart from these."""
        twin = copy(self)
        twin._ids, twin._counts, twin._index = self._ids.copy(), self._counts.copy(), dict(self._index)
        return twin


class BadWords:
    """Which tokens would now complete a forbidden token sequence.

    As in vLLM, only tokens of the *output* count as the beginning of a bad word: a word that begins in the prompt
    and ends in the output is not wholly in the output.
    """

    __slots__ = ("_endings", "_lengths", "_tail")

    def __init__(self, words: Sequence[Sequence[int]], output_ids: Sequence[int]) -> None:
        self._endings: dict[tuple[int, ...], list[int]] = {}
        for word in words:
            self._endings.setdefault(tuple(word[:-1]), []).append(word[-1])
        self._lengths = sorted({len(beginning) for beginning in self._endings})
        longest = self._lengths[-1]
        self._tail = list(output_ids[-longest:]) if longest else []

    def forbidden(self) -> Int64Array:
        """Token ids that must not come next."""
        tokens: list[int] = []
        for length in self._lengths:
            if length <= len(self._tail):
                tokens += self._endings.get(tuple(self._tail[len(self._tail) - length :]), ())
        return np.array(tokens, dtype=np.int64)

    def add(self, token: int) -> None:
        """The output grew by ``token``."""
        self._tail.append(token)
        if len(self._tail) > self._lengths[-1]:
            del self._tail[0]

    def copy(self) -> BadWords:
        """The same words and beginnings, to go on apart from these."""
        twin = copy(self)
        twin._tail = list(self._tail)
        return twin


@dataclass(slots=True)
class SlotRules:
    """What the built-in steps know of one slot; a step whose field is ``None`` is not run for it.

    Attributes:
        allowed: token ids that may be chosen.
        stops: token ids that min_tokens forbids for now (EOS and stop_token_ids).
        bad_words: forbidden token sequences.
        bias: token ids, and what is added to their logits.
        counts: tokens that the penalties look at.
        repetition, frequency, presence: the penalties.
    """

    allowed: Int64Array | None
    stops: Int64Array | None
    bad_words: BadWords | None
    bias: tuple[Int64Array, Float32Array] | None
    counts: TokenCounts | None
    repetition: float
    frequency: float
    presence: float

    @property
    def empty(self) -> bool:
        """No step needs this slot."""
        fields = (self.allowed, self.stops, self.bad_words, self.bias, self.counts)
        return all(value is None for value in fields)

    def add(self, token: int) -> None:
        """The output grew by ``token``."""
        if self.counts is not None:
            self.counts.add(token)
        if self.bad_words is not None:
            self.bad_words.add(token)

    def copy(self) -> SlotRules:
        """The same rules, to go on apart from these."""
        return replace(
            self,
            bad_words=None if self.bad_words is None else self.bad_words.copy(),
            counts=None if self.counts is None else self.counts.copy(),
        )


def slot_rules(
    params: SamplingParams,
    *,
    bad_word_ids: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    eos_token_ids: Sequence[int],
    vocab_size: int,
) -> SlotRules:
    """The rules of a slot with these parameters (defaults filled), its state rebuilt from its tokens.

    Raises:
        RequestError: a token id lies outside the vocabulary.
    """
    for name, ids in (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
        *(("bad_words", word) for word in bad_word_ids),
    ):
        _check_ids(name, ids, vocab_size)
    if not all(bad_word_ids):
        raise RequestError("bad_words has a word without tokens: leave it out", param="bad_words")
    repetition = 1.0 if params.repetition_penalty is None else params.repetition_penalty
    counts = None
    if repetition != 1.0 or params.frequency_penalty or params.presence_penalty:
        _check_ids("prompt", prompt_ids, vocab_size)
        counts = TokenCounts(prompt_ids if repetition != 1.0 else (), output_ids)
    stops = {*params.stop_token_ids, *(token for token in eos_token_ids if token < vocab_size)}
    bias = params.logit_bias
    return SlotRules(
        allowed=None
        if params.allowed_token_ids is None
        else np.array(params.allowed_token_ids, dtype=np.int64),
        stops=np.array(sorted(stops), dtype=np.int64)
        if stops and len(output_ids) < params.min_tokens
        else None,
        bad_words=BadWords(bad_word_ids, output_ids) if bad_word_ids else None,
        bias=(np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32))
        if bias
        else None,
        counts=counts,
        repetition=repetition,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
    )


def apply_rules(
    logits: torch.Tensor, rows: Sequence[int], rules: Sequence[SlotRules], early: Sequence[bool]
) -> None:
    """Run the built-in steps on some rows, in place, in the order that ``Sampler`` documents.

    Args:
        logits: float32 [N, V], contiguous.
        rows: K row indices; ``rules`` and ``early`` belong to them.
        early: the row has not reached its min_tokens.
    """
    pairs = list(zip(rows, rules, strict=True))
    _restrict(logits, [(row, rule.allowed) for row, rule in pairs if rule.allowed is not None])
    _forbid(
        logits,
        [
            (row, rule.stops)
            for (row, rule), too_early in zip(pairs, early, strict=True)
            if too_early and rule.stops is not None
        ],
    )
    _forbid(logits, [(row, rule.bad_words.forbidden()) for row, rule in pairs if rule.bad_words is not None])
    _add_bias(logits, [(row, *rule.bias) for row, rule in pairs if rule.bias is not None])
    _penalise(logits, [(row, rule, rule.counts) for row, rule in pairs if rule.counts is not None])


def _restrict(logits: torch.Tensor, allowed: Sequence[tuple[int, Int64Array]]) -> None:
    if not allowed:
        return
    places = _places(logits, allowed)
    flat = logits.view(-1)
    kept = flat[places]
    logits[[row for row, _ in allowed]] = -math.inf
    flat[places] = kept


def _forbid(logits: torch.Tensor, forbidden: Sequence[tuple[int, Int64Array]]) -> None:
    if forbidden:
        logits.view(-1)[_places(logits, forbidden)] = -math.inf


def _add_bias(logits: torch.Tensor, biases: Sequence[tuple[int, Int64Array, Float32Array]]) -> None:
    if biases:
        places = _places(logits, [(row, ids) for row, ids, _ in biases])
        values = np.concatenate([values for _, _, values in biases])
        logits.view(-1)[places] += torch.from_numpy(values).to(logits.device)


def _penalise(logits: torch.Tensor, penalised: Sequence[tuple[int, SlotRules, TokenCounts]]) -> None:
    """Repetition penalty of CTRL (arXiv:1909.05858), then OpenAI's frequency and presence penalties."""
    if not penalised:
        return
    sizes = [len(counts.ids) for _, _, counts in penalised]
    places = _places(logits, [(row, counts.ids) for row, _, counts in penalised])
    flat = logits.view(-1)

    def spread(values: Iterable[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(list(values), dtype=np.float32), sizes)).to(logits.device)

    counts = torch.from_numpy(np.concatenate([counts.counts for _, _, counts in penalised])).to(logits.device)
    repetition = spread(rule.repetition for _, rule, _ in penalised)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread(rule.frequency for _, rule, _ in penalised) * counts
    values -= spread(rule.presence for _, rule, _ in penalised) * (counts > 0)
    flat[places] = values


def _places(logits: torch.Tensor, pairs: Sequence[tuple[int, Int64Array]]) -> torch.Tensor:
    """(row, token ids) pairs as indices into the flattened logits."""
    width = logits.shape[-1]
    return torch.from_numpy(np.concatenate([row * width + ids for row, ids in pairs])).to(logits.device)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    worst = max(ids, default=0)
    if worst >= vocab_size:
        raise RequestError(
            f"{name} has token id {worst}, but the vocabulary has {vocab_size} tokens: "
            f"use ids from 0 to {vocab_size - 1}",
            param=name,
        )
