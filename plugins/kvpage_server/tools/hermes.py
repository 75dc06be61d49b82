"""Hermes' and Qwen's form: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of times."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvpage_server.tools import Tool
from kvpage_server.tools.call_parser import MOST_SPACE, JsonCallParser, begun, space_before
from kvpage_server.tools.call_reader import CallForm
from kvpage_server.tools.json_scanner import SPACE

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """Names are not looked up, for the tag says that a call is meant: who asked answers that there is no such tool.
    A missing end tag is forgiven, since models often end their turn in its place."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__(CallForm(argument_keys=frozenset({"arguments", "parameters"})))

    @staticmethod
    def force(name: str | None) -> str:
        """The beginning of a call of ``name``, or of any."""
        return OPEN + '\n{"name":' + ("" if name is None else f' {json.dumps(name)}, "arguments": {{')

    def find_opening(self, text: str) -> tuple[int, int | None]:
        tag = text.find(OPEN)
        if tag >= 0:
            return space_before(text, tag), tag + len(OPEN)
        start = space_before(text, len(text) - begun(text, OPEN))
        return start, None

    def find_close(self, text: str) -> int | None:
        place = 0
        for tag in (CLOSE, ""):
            spaces = 0
            while place < len(text) and text[place] in SPACE and spaces < MOST_SPACE:
                place, spaces = place + 1, spaces + 1
            rest = text[place:]
            if tag and rest.startswith(tag):
                place += len(tag)
            elif not rest or (tag and tag.startswith(rest)):
                return None
            else:
                return place
        return place
