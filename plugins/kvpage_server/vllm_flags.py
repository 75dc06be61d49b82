"""What became of vLLM's flags that kvpage does not have by the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """``fate``: "ignored" (harmless: warned of and left out, with its values) or "refused".

    Attributes:
        values: words that follow the flag; -1 = all up to the next flag.
        reason: what is said, a clause without a full stop.
    """

    fate: Literal["ignored", "refused"]
    reason: str
    values: int = 1


FLAGS: Mapping[str, ForeignFlag] = {}
"""Flag, with hyphens ("--swap-space") -> what became of it."""


def explain_unknown_flag(flag: str) -> ForeignFlag | None:
    """What is known of a flag that ``serve`` does not have; ``None`` if vLLM has no such flag either."""
    return FLAGS.get(flag)
