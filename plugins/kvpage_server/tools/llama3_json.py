"""Llama 3's form: {"name": ..., "parameters": {...}}, behind <|python_tag|> or not, several of them behind "; "."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from kvpage_server.tools import Tool
from kvpage_server.tools.call_parser import MOST_SPACE, JsonCallParser, begun, space_before
from kvpage_server.tools.call_reader import CallForm
from kvpage_server.tools.json_scanner import SPACE

TAG = "<|python_tag|>"
SEPARATORS = ";,"


class Llama3JsonParser(JsonCallParser):
    """An object is taken for a call where it begins a line, or follows the tag or another call, names a tool that
    the request brought and has arguments; any other JSON is content."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        names = [tool["function"]["name"] for tool in tools if isinstance(tool.get("function"), Mapping)]
        super().__init__(
            CallForm(
                argument_keys=frozenset({"parameters", "arguments"}),
                other_keys=frozenset({"type", "id"}),
                names=frozenset(names) if names else None,
                needs_arguments=True,
            )
        )
        self._line_begins = True  # nothing but white space came on this line

    @staticmethod
    def force(name: str | None) -> str:
        """The beginning of a call of ``name``, or of any."""
        return '{"name":' + ("" if name is None else f' {json.dumps(name)}, "parameters": {{')

    def find_opening(self, text: str) -> tuple[int, int | None]:
        place = 0
        while True:
            brace, tag = text.find("{", place), text.find(TAG, place)
            if brace >= 0 and (tag < 0 or brace < tag):
                if self._begins_line(text, brace):
                    return space_before(text, brace), brace
                place = brace + 1
            elif tag >= 0:
                place = tag + len(TAG)
                brace = _skip_space(text, place)
                if brace == len(text):
                    start = space_before(text, tag)
                    return start, None
                if text.startswith("{", brace):
                    return space_before(text, tag), brace
            else:
                start = space_before(text, len(text) - begun(text, TAG))
                return start, None

    def find_close(self, text: str) -> int | None:
        place = _skip_space(text, 0)
        if place < len(text) and text[place] in SEPARATORS:
            place = _skip_space(text, place + 1)
        if place == len(text):
            return None
        self._line_begins = True
        return place

    def passed(self, text: str) -> None:
        _, newline, line = text.rpartition("\n")
        self._line_begins = (bool(newline) or self._line_begins) and not line.strip(" \t\r\n")

    def _begins_line(self, text: str, place: int) -> bool:
        while place > 0 and text[place - 1] in SPACE:
            place -= 1
            if text[place] == "\n":
                return True
        return place == 0 and self._line_begins


def _skip_space(text: str, place: int) -> int:
    """Behind the white space at ``place``, ``MOST_SPACE`` characters of it at most."""
    end = min(len(text), place + MOST_SPACE)
    while place < end and text[place] in SPACE:
        place += 1
    return place
