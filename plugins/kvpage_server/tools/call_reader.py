"""One call as models write it, {"name": ..., "arguments": {...}}, read character by character."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvpage_server.tools.json_scanner import SPACE, Expect, JsonScanner


@dataclass(frozen=True, slots=True)
class CallForm:
    """What an object must look like to be a call.

    Attributes:
        argument_keys: the arguments go by one of these.
        other_keys: further keys it may have; ``None`` = any. A key that is not allowed ends the attempt early.
        names: functions it may name; ``None`` = any.
        needs_arguments: without arguments it is no call; else they are {}.
    """

    argument_keys: frozenset[str]
    other_keys: frozenset[str] | None = None
    names: frozenset[str] | None = None
    needs_arguments: bool = False


class CallReader:
    """Reads one JSON object.

    Attributes:
        raw: the characters taken.
        announced: ``take`` gave the name out.
        whole: the object is complete, and a call.
    """

    def __init__(self, form: CallForm) -> None:
        self.raw: list[str] = []
        self.announced = False
        self.whole = False
        self._form = form
        self._scanner = JsonScanner()
        self._key: str | None = None
        self._start = 0  # where the current key or value of the object began
        self._name: str | None = None
        self._arguments: list[str] | None = None  # None: not begun
        self._streaming = False  # inside the object that the arguments are
        self._taken = 0

    def feed(self, char: str) -> bool:
        """Take the next character; ``False`` if this can be no call any more (``raw`` is without the character)."""
        scanner = self._scanner
        depth, expect, in_string = scanner.depth, scanner.expect, scanner.in_string
        if not scanner.feed(char):
            return False
        self.raw.append(char)
        if depth == 0:
            return char == "{" or char in SPACE or self._refuse()
        at_value = depth == 1 and expect is Expect.VALUE and char not in SPACE
        if at_value and not self._begin_value(char):
            return self._refuse()
        if self._streaming and self._arguments is not None:
            self._arguments.append(_escape(char) if in_string and char < " " else char)
        if depth == 1 and expect in (Expect.KEY, Expect.KEY_OR_END) and char == '"':
            self._start = len(self.raw) - 1
        elif depth == 1 and in_string and scanner.expect is Expect.COLON:
            self._key = self._string()
            if not self._key_allowed():
                return self._refuse()
        elif scanner.depth == 1 and scanner.expect is Expect.COMMA_OR_END:
            ended = depth == 2 or expect is not Expect.COMMA_OR_END
            if ended and not self._end_value():
                return self._refuse()
        if scanner.expect is Expect.NOTHING:
            return self._end() or self._refuse()
        return True

    def take(self) -> tuple[str | None, str]:
        """(the name, the first time that it is certain; what the arguments gained since the last time)."""
        if self._name is None or self._arguments is None:
            return None, ""
        name = None if self.announced else self._name
        self.announced = True
        gained = "".join(self._arguments[self._taken :])
        self._taken = len(self._arguments)
        return name, gained

    @property
    def arguments(self) -> str:
        """The arguments so far."""
        return "".join(self._arguments or ())

    @property
    def name(self) -> str:
        """The name, if it came."""
        return self._name or ""

    def _refuse(self) -> bool:
        self.raw.pop()
        return False

    def _key_allowed(self) -> bool:
        form, key = self._form, self._key
        if key == "name":
            return self._name is None
        if key in form.argument_keys:
            return self._arguments is None
        return form.other_keys is None or key in form.other_keys

    def _begin_value(self, char: str) -> bool:
        self._start = len(self.raw) - 1
        if self._key == "name":
            return char == '"'
        if self._key in self._form.argument_keys:
            if char == "{":
                self._arguments, self._streaming = [], True
            return char in '{"n'  # an object; its JSON in a string; null
        return True

    def _end_value(self) -> bool:
        if self._key == "name":
            self._name = self._string()
            return bool(self._name) and (self._form.names is None or self._name in self._form.names)
        if self._key in self._form.argument_keys:
            if not self._streaming:
                return self._take_written_out()
            self._streaming = False
        return True

    def _take_written_out(self) -> bool:
        """Arguments as a string that holds JSON, or null."""
        value = json.loads("".join(self.raw[self._start :]), strict=False)
        text = (value or "").strip() or "{}"
        scanner = JsonScanner()
        if not text.startswith("{") or not all(scanner.feed(char) for char in text):
            return False
        if scanner.expect is not Expect.NOTHING:
            return False
        scanner = JsonScanner()
        self._arguments = []
        for char in text:
            self._arguments.append(_escape(char) if scanner.in_string and char < " " else char)
            scanner.feed(char)
        return True

    def _end(self) -> bool:
        if self._arguments is None and not self._form.needs_arguments:
            self._arguments = ["{}"]
        self.whole = self._name is not None and self._arguments is not None
        return self.whole

    def _string(self) -> str:
        return str(json.loads("".join(self.raw[self._start :]), strict=False))


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1]
