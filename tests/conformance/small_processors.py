"""Logits processors that keep the contract, for their suite: with state, without, and without need of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvpage import RequestError, SamplingParams
from kvpage.api.sampling import LogitsProcessor


class NoRepeat(LogitsProcessor):
    """A token that was generated in the last ``window`` steps loses ``penalty``; needs tokens, keeps state."""

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}
        self.windows: dict[int, int] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        window = (params.extra_args or {}).get("window", 3)
        if not isinstance(window, int) or window < 1:
            raise RequestError(f"window must be a positive int, got {window!r}", param="extra_args")
        self.windows[slot], self.known[slot] = window, list(prompt_ids[-1:])

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for row, slot in enumerate(slots):
            logits[row, self.known[slot][-self.windows[slot] :]] -= 3.0
        return logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.known[slot].extend(token_ids)

    def rollback(self, slot: int, count: int) -> None:
        if count:
            del self.known[slot][-count:]

    def release(self, slot: int) -> None:
        self.known.pop(slot, None)
        self.windows.pop(slot, None)


class Sharpen(LogitsProcessor):
    """Logits times a factor, as a new tensor: the likeliest stays, tokens do not matter."""

    keeps_argmax = True
    needs_tokens = False

    def __init__(self) -> None:
        self.factors: dict[int, float] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.factors[slot] = 2.0

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return logits * torch.tensor([[self.factors[slot]] for slot in slots])
