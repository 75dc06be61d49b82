"""A conversation in the terminal, whoever answers: the lines that are typed, and what they do."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod

from kvpage.cli.main import ERROR, NO, OK
from kvpage.flags.parser import UsageError


class Dialogue(ABC):
    """Messages so far, and what a line typed by the user does to them.

    Attributes:
        interrupted: Ctrl-C ended the latest answer. refused: messages so far that could not be asked.
    """

    def __init__(self, system: str | None) -> None:
        self._messages: list[dict[str, str]] = []
        self.interrupted, self.refused = False, 0
        self.start(system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as chat messages (a copy)."""
        return list(self._messages)

    def start(self, system: str | None) -> None:
        """A new conversation, which begins with the system message."""
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """A line of the user's: a command or a message; ``False`` when it asks to leave."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.start(self._system)
        elif command == "/system":
            self.start(rest.strip() or None)
        elif command.startswith("/"):
            print(f"there is no {command}: /system TEXT, /reset, /exit", file=sys.stderr)
        elif line.strip():
            self.answer(line.strip())
        return True

    @abstractmethod
    def answer(self, text: str) -> None:
        """Ask and print the answer as it comes. A message that cannot be asked is taken back and said so.

        Ctrl-C ends the answer, and sets ``interrupted``.
        """

    def _take_back(self, error: Exception) -> None:
        self._messages.pop()
        self.refused += 1
        print(f"error: {error} (/reset begins anew)", file=sys.stderr)


def hold(dialogue: Dialogue, quick: str | None) -> int:
    """Answer ``quick`` alone, or every line of standard input; the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C where nobody types.
    """
    if quick is not None:
        dialogue.answer(quick)
        _leave_if_interrupted(dialogue)
        return ERROR if dialogue.refused else OK
    if sys.stdin is None:
        raise UsageError("standard input is closed: pipe messages in, or ask one with --quick TEXT")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # line editing and history where the platform has them
            import readline  # noqa: F401
        print("type a message; /exit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    while (line := read_line(interactive)) is not None:
        if not dialogue.take(line):
            break
        if not interactive:
            _leave_if_interrupted(dialogue)
    return NO if dialogue.refused and not interactive else OK


def _leave_if_interrupted(dialogue: Dialogue) -> None:
    """Where nobody types, Ctrl-C means the program, not the answer."""
    if dialogue.interrupted:
        raise KeyboardInterrupt


def read_line(interactive: bool) -> str | None:
    """The next line, ``None`` at the end. Ctrl-C at an empty prompt asks again."""
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
