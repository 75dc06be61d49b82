"""What parsers of calls written as JSON share: text outside, a call, what follows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvpage_server.tools import ToolCall, ToolDelta
from kvpage_server.tools.call_reader import CallForm, CallReader
from kvpage_server.tools.json_scanner import SPACE


@dataclass(frozen=True, slots=True)
class _Whole:
    """A call ended well."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class _Broken:
    """What began as a call is none; a stream may have given out its beginning."""

    raw: str
    announced: bool


_Event = ToolDelta | _Whole | _Broken

PIECE = 4096  # characters of a whole text that are read at a time: what follows a broken call is read again
MOST_SPACE = 64
"""White space before or behind a call that is taken for a part of it; more of it is content."""


class JsonCallParser(ABC):
    """A ``ToolParser`` for texts in which calls stand as JSON objects behind an opening.

    White space around calls belongs to them. A call that breaks off is content in ``parse``; a stream cannot take
    back what it gave out of it, and goes on with what follows as content. However a text is split, the deltas of a
    stream add up to the same.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._held = (
            ""  # outside: white space, and what may begin an opening; after a call: what may close it
        )
        self._opening = ""  # of the call that is being read
        self._reader: CallReader | None = None
        self._after = False  # between a call and what follows
        self._count = 0

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        content: list[str] = []
        calls: list[ToolCall] = []
        pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
        for event in [*(event for piece in pieces for event in self._push(piece)), *self._end()]:
            if isinstance(event, _Whole):
                calls.append(event.call)
            elif isinstance(event, _Broken):
                content.append(event.raw)
            else:
                content.append(event.content)
        return "".join(content), calls

    def feed(self, delta: str) -> list[ToolDelta]:
        return _deltas(self._push(delta))

    def finish(self) -> list[ToolDelta]:
        return _deltas(self._end())

    # ---- what formats say -------------------------------------------------------------------------------

    @abstractmethod
    def find_opening(self, text: str) -> tuple[int, int | None]:
        """(start, end) of the first opening in ``text``, white space before it included; the object begins at
        ``end``. Without one (start, None): from ``start`` on the text may yet become one."""

    @abstractmethod
    def find_close(self, text: str) -> int | None:
        """How much of ``text``, which follows a call, still belongs to it; ``None``: not certain yet."""

    def passed(self, text: str) -> None:
        """``text`` was found to be content."""

    # ---- the machine ------------------------------------------------------------------------------------

    def _push(self, text: str) -> list[_Event]:
        events: list[_Event] = []
        while text:
            if self._reader is not None:
                text = self._inside(self._reader, text, events)
            elif self._after:
                text = self._behind(text)
            else:
                text = self._outside(text, events)
        return events

    def _outside(self, text: str, events: list[_Event]) -> str:
        text = self._held + text
        start, end = self.find_opening(text)
        self._content(text[:start], events)
        if end is None:
            self._held = text[start:]
            return ""
        self._held, self._opening = "", text[start:end]
        self._reader = CallReader(self._form)
        return text[end:]

    def _inside(self, reader: CallReader, text: str, events: list[_Event]) -> str:
        for position, char in enumerate(text):
            if not reader.feed(char):
                self._break_off(reader, events)
                return text[position:]
            if reader.whole:
                self._gained(reader, events)
                events.append(_Whole(ToolCall(reader.name, reader.arguments)))
                self._count += 1
                self._reader, self._after = None, True
                return text[position + 1 :]
        self._gained(reader, events)
        return ""

    def _gained(self, reader: CallReader, events: list[_Event]) -> None:
        name, arguments = reader.take()
        if name is not None or arguments:
            events.append(ToolDelta(self._count, name, arguments))

    def _break_off(self, reader: CallReader, events: list[_Event]) -> None:
        self._gained(reader, events)
        raw = self._opening + "".join(reader.raw)
        events.append(_Broken(raw, reader.announced))
        self.passed(raw)
        self._count += reader.announced
        self._reader = None

    def _behind(self, text: str) -> str:
        text = self._held + text
        length = self.find_close(text)
        if length is None:
            self._held = text
            return ""
        self._held, self._after = "", False
        return text[length:]

    def _end(self) -> list[_Event]:
        events: list[_Event] = []
        if self._reader is not None:
            self._break_off(self._reader, events)
        elif not self._after:
            self._content(self._held, events)
        self._held = ""
        return events

    def _content(self, text: str, events: list[_Event]) -> None:
        if text:
            events.append(ToolDelta(content=text))
            self.passed(text)


def space_before(text: str, end: int) -> int:
    """Where the white space that ends at ``end`` begins, ``MOST_SPACE`` characters of it at most."""
    start = end
    while start > max(0, end - MOST_SPACE) and text[start - 1] in SPACE:
        start -= 1
    return start


def begun(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``; all of it does not count."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _deltas(events: list[_Event]) -> list[ToolDelta]:
    """What a stream tells of them."""
    deltas = []
    for event in events:
        if isinstance(event, ToolDelta):
            deltas.append(event)
        elif isinstance(event, _Broken) and not event.announced:
            deltas.append(ToolDelta(content=event.raw))
    return deltas
