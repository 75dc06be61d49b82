"""A logits processor: no sequence of n tokens is generated twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage import RequestError, SamplingParams
from kvpage.api.sampling import LogitsProcessor


class NoRepeatNgram(LogitsProcessor):
    """Forbids each token that would repeat an n-gram of the text, the prompt included.

    Requests ask for it with ``SamplingParams(logits_processors=["no_repeat_ngram"],
    extra_args={"no_repeat_ngram_size": 3})``.
    """

    needs_tokens = True  # what it forbids depends on the tokens chosen so far

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._size: dict[int, int] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        size = (params.extra_args or {}).get("no_repeat_ngram_size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise RequestError(
                f"no_repeat_ngram_size must be a whole number of at least 1, got {size!r}: "
                'give it in extra_args={"no_repeat_ngram_size": 3}'
            )
        self._size[slot] = size
        self._tokens[slot] = list(prompt_ids)

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self._tokens[slot].extend(token_ids)

    def rollback(self, slot: int, count: int) -> None:
        del self._tokens[slot][len(self._tokens[slot]) - count :]

    def release(self, slot: int) -> None:
        self._tokens.pop(slot, None)
        self._size.pop(slot, None)

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for row, slot in enumerate(slots):
            forbidden = self._repeating(slot)
            if forbidden:
                logits[row, forbidden] = -torch.inf
        return logits

    def _repeating(self, slot: int) -> list[int]:
        """Tokens that followed the last n-1 tokens before."""
        tokens, before = self._tokens[slot], self._size[slot] - 1
        tail = tokens[len(tokens) - before :]
        if len(tail) < before:
            return []
        ends = range(before, len(tokens))
        return sorted({tokens[end] for end in ends if tokens[end - before : end] == tail})
