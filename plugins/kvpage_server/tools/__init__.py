"""Tool calls in a model's text: what a parser offers, and how one is found by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Tool = Mapping[str, Any]
"""{"type": "function", "function": {"name", "description", "parameters"}}, as the request brought it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; ``arguments`` is JSON text, as OpenAI's clients expect it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """What a stream gained: of call ``index`` (0, 1 ... in a choice) a name, once and first, and more arguments.

    ``index`` is ``None`` where ``content`` holds text outside all calls.
    """

    index: int | None = None
    name: str | None = None
    arguments: str = ""
    content: str = ""


class ToolParser(Protocol):
    """Finds the calls in the text of one choice. A fresh object a choice: ``feed`` keeps what it has not given out.

    Text that only looks like a call (malformed, cut off, an unknown name where the parser cares) is content: a
    parser never raises, whatever the model wrote.
    """

    @staticmethod
    def force(name: str | None) -> str:
        """Text that begins a call of ``name``, up to where its arguments begin, or of any tool: put behind the
        prompt, it leaves a model no choice but to go on with the call."""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """(content outside the calls, the calls in order) of a whole text."""

    def feed(self, delta: str) -> list[ToolDelta]:
        """What is certain after ``delta``. Text that may yet begin a call is held back."""

    def finish(self) -> list[ToolDelta]:
        """What is still held back, once no more text comes."""


ToolParserFactory = Callable[[Sequence[Tool]], ToolParser]


@dataclass(frozen=True, slots=True)
class ParserEntry:
    """``factory``: "module:name" of a ToolParserFactory. ``special_tokens``: calls are marked by special tokens,
    so these must stay in the text."""

    factory: str
    special_tokens: bool = False

    def load(self) -> ToolParserFactory:
        """The factory itself."""
        module, _, attribute = self.factory.partition(":")
        factory: ToolParserFactory = getattr(importlib.import_module(module), attribute)
        return factory


PARSERS: dict[str, ParserEntry] = {
    "hermes": ParserEntry("kvpage_server.tools.hermes:HermesParser", special_tokens=True),
    "llama3_json": ParserEntry("kvpage_server.tools.llama3_json:Llama3JsonParser", special_tokens=True),
    "llama4_json": ParserEntry("kvpage_server.tools.llama3_json:Llama3JsonParser", special_tokens=True),
}
"""By the name that ``--tool-call-parser`` takes."""
