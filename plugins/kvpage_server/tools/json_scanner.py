"""JSON that arrives in pieces: is what came so far the beginning of a value, and where does the value end?"""

from __future__ import annotations

import re
from enum import Enum, auto

SPACE = frozenset(" \t\n\r")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
LITERALS = ("true", "false", "null")
MAX_DEPTH = 64


class Expect(Enum):
    """What the next character belongs to."""

    VALUE = auto()
    ITEM_OR_END = auto()  # after "["
    KEY_OR_END = auto()  # after "{"
    KEY = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    LITERAL = auto()
    NOTHING = auto()


class JsonScanner:
    """Takes one JSON value, character by character.

    Stricter than a parser in one thing, that nesting ends at ``MAX_DEPTH``, and laxer in one: raw control characters
    may stand in strings, as models write them; who passes the text on escapes them.

    Attributes:
        expect: what the next character belongs to; NOTHING once the value is whole.
        depth: containers that are open.
    """

    __slots__ = ("_key", "_stack", "_word", "expect")

    def __init__(self) -> None:
        self.expect = Expect.VALUE
        self._stack: list[str] = []
        self._word = ""  # of a number or literal; the hex digits of an escape
        self._key = False  # the string is a key

    @property
    def depth(self) -> int:
        return len(self._stack)

    @property
    def in_string(self) -> bool:
        """Whether the next character is content of a string, or its end."""
        return self.expect is Expect.STRING

    def feed(self, char: str) -> bool:
        """Take the next character; ``False`` if no JSON continues this way (the scanner is of no more use then)."""
        expect = self.expect
        if expect is Expect.STRING:
            if char == '"':
                self._end_string()
            elif char == "\\":
                self.expect = Expect.ESCAPE
            return True
        if expect in (Expect.ESCAPE, Expect.HEX):
            return self._escaped(char)
        if expect in (Expect.NUMBER, Expect.LITERAL):
            return self._word_goes_on(char)
        if char in SPACE:
            return True
        if expect is Expect.COLON:
            self.expect = Expect.VALUE
            return char == ":"
        if expect is Expect.COMMA_OR_END:
            return self._after_value(char)
        if expect in (Expect.KEY, Expect.KEY_OR_END):
            if char == '"':
                self.expect, self._key = Expect.STRING, True
                return True
            return expect is Expect.KEY_OR_END and char == "}" and self._close()
        if expect is Expect.ITEM_OR_END and char == "]":
            return self._close()
        return expect is not Expect.NOTHING and self._begin_value(char)

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            self._stack.append(char)
            self.expect = Expect.KEY_OR_END if char == "{" else Expect.ITEM_OR_END
            return len(self._stack) <= MAX_DEPTH
        if char == '"':
            self.expect, self._key = Expect.STRING, False
            return True
        self._word = char
        self.expect = Expect.NUMBER if char in "-0123456789" else Expect.LITERAL
        return self.expect is Expect.NUMBER or char in "tfn"

    def _word_goes_on(self, char: str) -> bool:
        if self.expect is Expect.LITERAL:
            self._word += char
            if self._word in LITERALS:
                self._end_value()
                return True
            return any(literal.startswith(self._word) for literal in LITERALS)
        if char in "+-.eE0123456789":
            self._word += char
            return len(self._word) < 400
        if not NUMBER.fullmatch(self._word):
            return False
        self._end_value()
        return char in SPACE or self._after_value(char)

    def _escaped(self, char: str) -> bool:
        if self.expect is Expect.HEX:
            self._word += char
            if len(self._word) == 4:
                self.expect = Expect.STRING
            return char in "0123456789abcdefABCDEF"
        self.expect, self._word = (Expect.HEX if char == "u" else Expect.STRING), ""
        return char in '"\\/bfnrtu'

    def _after_value(self, char: str) -> bool:
        if not self._stack:
            return False
        inside = self._stack[-1]
        if char == ",":
            self.expect = Expect.KEY if inside == "{" else Expect.VALUE
            return True
        return char == {"{": "}", "[": "]"}[inside] and self._close()

    def _end_string(self) -> None:
        if self._key:
            self.expect = Expect.COLON
        else:
            self._end_value()

    def _close(self) -> bool:
        self._stack.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self.expect = Expect.COMMA_OR_END if self._stack else Expect.NOTHING
