"""The contract of a logits processor: change one step's logits before tokens are chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from kvpage.params import SamplingParams


class LogitsProcessor(ABC):
    """Keeps its own state a slot; a slot is a sequence's name from admission to preemption or end.

    One object serves one engine. Calls come from the thread that steps the engine, in this order for a slot:
    ``admit`` (again after a preemption, with all tokens known by then), then ``apply`` and ``advance`` once a
    sampled token, ``rollback`` where drafted tokens were refused, ``release`` once.
    """

    keeps_argmax: ClassVar[bool] = False
    """True if the likeliest token is never changed: greedy rows then skip this processor."""

    needs_tokens: ClassVar[bool] = True
    """True if ``apply`` depends on the tokens given to ``advance``: such a slot is not scheduled ahead."""

    @abstractmethod
    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """A sequence starts on ``slot``. ``params`` carries this processor's values in ``extra_args``.

        Raises:
            kvpage.errors.RequestError: the values are wrong; the request alone ends in error.
        """

    @abstractmethod
    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """Change ``logits`` (float32 [N, V], row i belongs to ``slots[i]``), in place or anew; returns them.

        Called only with slots whose request named this processor. -inf forbids a token.
        """

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        """Tokens were chosen for ``slot`` (at re-admission: all that were generated before)."""

    def rollback(self, slot: int, count: int) -> None:
        """The last ``count`` tokens given to ``advance`` did not stand."""

    def release(self, slot: int) -> None:
        """The sequence left ``slot``; forget it."""
