"""The contract of a proposer of draft tokens. Provisional: it may change until the first one lands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence


class Proposer(ABC):
    """Guesses the next tokens of running sequences; the target model verifies them, so that a wrong guess costs
    time and never changes a result. State is kept a slot, as a ``LogitsProcessor`` keeps it."""

    @abstractmethod
    def propose(self, known: Mapping[int, Sequence[int]], limit: int) -> Mapping[int, Sequence[int]]:
        """Drafts by slot, at most ``limit`` tokens each; a slot may be left out.

        ``known``: the tokens of each slot so far, prompt included; valid during the call.
        """

    def release(self, slot: int) -> None:
        """The sequence left ``slot``; forget it."""
