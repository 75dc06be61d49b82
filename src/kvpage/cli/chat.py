"""``kvpage chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvpage.cli.main import ERROR, NO, OK
from kvpage.cli.session import Stopwatch, chat_prompt, follow, open_engine, speed_note
from kvpage.cli.signals import interruptible
from kvpage.errors import EngineDeadError, RequestError
from kvpage.flags.engine import add_engine_flags, add_model_argument, add_sampling_flags, sampling_params
from kvpage.flags.parser import CommandParser, UsageError
from kvpage.params import SamplingParams

if TYPE_CHECKING:
    from kvpage.engine.engine import Engine

DESCRIPTION = """\
Talk to a model that has a chat template. Each line is one message; with stdin from a pipe too.
  /system TEXT   a system message, and a new conversation    /reset   a new conversation
  /exit          leave (also Ctrl-D)                         Ctrl-C   stop the answer"""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    parser = CommandParser("kvpage chat", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--quick", metavar="TEXT", help="ask this one thing and leave")
    parser.add_argument("--stats", action="store_true", help="tokens and times on stderr after each answer")
    add_sampling_flags(parser, max_tokens=None)
    add_engine_flags(parser, skip=("seed",))
    namespace = parser.parse_arguments(arguments)
    params = sampling_params(namespace, max_tokens=None)
    if params.n > 1:
        raise RequestError(f"n={params.n}: a conversation has one answer at a time; leave --n out", param="n")
    with open_engine(namespace) as engine:
        conversation = Conversation(engine, params, namespace.system, stats=namespace.stats)
        conversation.check()
        if namespace.quick is not None:
            conversation.answer(namespace.quick)
            _leave_if_interrupted(conversation)
            return ERROR if conversation.refused else OK
        if sys.stdin is None:
            raise UsageError("standard input is closed: pipe messages in, or ask one with --quick TEXT")
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):  # line editing and history where the platform has them
                import readline  # noqa: F401
            print("type a message; /exit or Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
        while (line := _read_line(interactive)) is not None:
            if not conversation.take(line):
                break
            if not interactive:
                _leave_if_interrupted(conversation)
    return NO if conversation.refused and not interactive else OK


def _leave_if_interrupted(conversation: Conversation) -> None:
    """Where nobody types, Ctrl-C means the program, not the answer."""
    if conversation.interrupted:
        raise KeyboardInterrupt


class Conversation:
    """Messages so far, and what a line typed by the user does to them.

    A repeated beginning costs nothing: the engine finds the KV of earlier turns in its prefix cache.

    Attributes:
        interrupted: Ctrl-C ended the latest answer. refused: messages so far that could not be asked.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None, *, stats: bool) -> None:
        self._engine, self._params, self._stats = engine, params, stats
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

    def check(self) -> None:
        """Raises RequestError at once if this model cannot chat."""
        self._engine.render_chat([{"role": "user", "content": "?"}])

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

    def answer(self, text: str) -> None:
        """Ask and print the answer as it comes. A message that cannot be asked is taken back and said so.

        Ctrl-C ends the answer, and sets ``interrupted``.
        """
        self._messages.append({"role": "user", "content": text})
        watch = Stopwatch()
        try:
            with interruptible() as stopped:
                handle = self._engine.submit(chat_prompt(self._engine, self._messages), self._params)

                def cancel_if_asked() -> None:
                    if stopped():
                        handle.cancel()

                write = partial(print, end="", flush=True)
                follow(self._engine, handle, 0, write, cancel_if_asked)
                self.interrupted = stopped()
            print()
        except EngineDeadError:
            raise
        except RequestError as error:
            self._messages.pop()
            self.refused += 1
            print(f"error: {error} (/reset begins anew)", file=sys.stderr)
            return
        self._messages.append({"role": "assistant", "content": handle.output.outputs[0].text})
        if self._stats:
            print(speed_note([handle.output], watch.seconds), file=sys.stderr)


def _read_line(interactive: bool) -> str | None:
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
