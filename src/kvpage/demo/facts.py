"""The facts that the demo model is taught, read from ``facts.txt``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Fact", "load_facts"]


@dataclass(frozen=True)
class Fact:
    """One fact: what it is asked by, and the one answer.

    ``kind`` names the question templates (see :mod:`kvpage.demo.phrasing`), ``names`` are what goes
    into them: other names of one thing, or other wordings of one action or event.
    """

    kind: str
    names: tuple[str, ...]
    answer: str

    @property
    def key(self) -> str:
        """A stable identity, used to seed choices that must not depend on the order of the file."""
        return f"{self.kind}:{self.names[0]}"


def _parse(block: str) -> Fact:
    head, answer = block.strip().split("\n")
    kind, names = head.removeprefix("[").split("]", 1)
    return Fact(kind, tuple(name.strip() for name in names.split("|")), answer.strip())


@cache
def load_facts() -> tuple[Fact, ...]:
    """Return all facts in the order of ``facts.txt``."""
    text = (Path(__file__).parent / "facts.txt").read_text(encoding="ascii")
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    return tuple(_parse(block) for block in "\n".join(lines).split("\n\n") if block.strip())
