"""What became of vLLM's flags that kvpage does not have by the same name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvpage_server.vllm_flag_table import IGNORED, IMPLEMENTED, REFUSED, SHORTS, FlagGroup

VLLM_VERSION = "0.32.0"
ALL_WORDS = -1


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """``fate``: "ignored" (harmless: warned of and left out, with its values) or "refused".

    Attributes:
        values: words that follow the flag; -1 = all up to the next flag.
        reason: what is said, a clause without a full stop.
        off: values with which the flag asks for what kvpage does anyway, so that it is ignored.
    """

    fate: Literal["ignored", "refused"]
    reason: str
    values: int = 1
    off: tuple[str, ...] = ()


def _rows(
    fate: Literal["ignored", "refused"], groups: Sequence[FlagGroup]
) -> Iterator[tuple[str, ForeignFlag]]:
    for group in groups:
        for names, values in ((group.switches, 0), (group.values, 1), (group.lists, ALL_WORDS)):
            for name in names.split():
                yield name, ForeignFlag(fate, group.reason, values, group.off.get(name, ()))


FLAGS: Mapping[str, ForeignFlag] = {**dict(_rows("ignored", IGNORED)), **dict(_rows("refused", REFUSED))}
"""Flag, with hyphens ("--swap-space") -> what became of it. Those that kvpage has are not among them."""

_IMPLEMENTED = frozenset(name for group in IMPLEMENTED for name in group.names())


def explain_unknown_flag(flag: str, value: str | None = None) -> ForeignFlag | None:
    """What is known of a flag that ``serve`` does not have; ``None`` if vLLM has no such flag either.

    Shorts (``-pp``), ``--no-`` forms and dotted ones (``--speculative-config.method``, one value each) are answered
    as the flag they belong to.

    Args:
        flag: as typed, with hyphens, without "=value".
        value: what follows, where something does; a refused flag that asks for nothing with it is "ignored".
    """
    if re.fullmatch(r"-O\d", flag):  # vLLM's "-O3"
        return ForeignFlag("ignored", FLAGS[SHORTS["-O"]].reason, 0)
    name, dot, _ = flag.partition(".")
    name = SHORTS.get(name, name)
    feature = FLAGS.get(name.replace("--no-", "--", 1)) if name.startswith("--no-") else None
    if feature is not None and feature.values == 0 and not dot:
        return feature if feature.fate == "ignored" else ForeignFlag("ignored", "it is off anyway", 0)
    if name != flag and name in _IMPLEMENTED and not dot:
        return ForeignFlag("refused", f"kvpage spells it {name}")
    answer = FLAGS.get(name)
    if answer is None or (dot and answer.values == 0):
        return None
    if dot:
        return ForeignFlag(answer.fate, answer.reason)
    if answer.fate == "refused" and value is not None and value.lower() in answer.off:
        return ForeignFlag("ignored", "that is how kvpage runs anyway", answer.values)
    return answer


def flag_reference() -> str:
    """The table of all flags as Markdown, for the documentation."""
    shorts: dict[str, list[str]] = {}
    for short, name in SHORTS.items():
        shorts.setdefault(name, []).append(short)
    lines = ["| flag | kvpage | why, and what instead |", "|---|---|---|"]
    rows = [(name, "implemented", group.reason) for group in IMPLEMENTED for name in group.names()]
    rows += [(name, flag.fate, flag.reason) for name, flag in FLAGS.items()]
    for name, fate, reason in sorted(rows):
        spellings = ", ".join(f"`{spelling}`" for spelling in (name, *shorts.get(name, ())))
        off = FLAGS[name].off if name in FLAGS else ()
        accepted = f"; accepted: {', '.join(f'`{value}`' for value in off if value)}" if any(off) else ""
        lines.append(f"| {spellings} | {fate} | {reason}{accepted} |")
    return "\n".join(lines)
