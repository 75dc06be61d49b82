"""Stop strings in growing text: found as soon as they are complete, never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Incremental search for stop strings.

    The match that ends first wins; of two that end together, the one listed first. That is what looking after
    every character would find, so the result does not depend on how the text is cut into deltas (vLLM looks after
    every token and takes the first listed that it finds, which is the same unless one token completes several).

    Args:
        stops: non-empty strings; none at all makes this a pass-through.
        include_in_output: emit the text through the match instead of up to it.
    """

    __slots__ = ("_held", "_include", "_matched", "_stops")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""
        self._matched: str | None = None

    def push(self, delta: str) -> tuple[str, str | None]:
        """Add text; returns the text that is safe to emit, and the stop string that was found.

        The longest suffix that could begin a stop string is held back. After a match everything is dropped.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + delta
        matched, end = None, len(text) + 1
        for stop in self._stops:
            found = text.find(stop, 0, end - 1)
            if found >= 0:
                matched, end = stop, found + len(stop)
        if matched is not None:
            self._matched, self._held = matched, ""
            return text[: end if self._include else end - len(matched)], matched
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return (text[: len(text) - held] if held else text), None

    def ignore(self, delta: str) -> str:
        """Add text that is not searched and that no later match reaches back into (before ``min_tokens``).

        Returns the text to emit: all of it, and what was held back.
        """
        return self.flush() + delta

    def flush(self) -> str:
        """What is still held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that a stop string begins with."""
        longest = 0
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
