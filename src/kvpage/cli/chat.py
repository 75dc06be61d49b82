"""``kvpage chat``: a conversation in the terminal, with a model in this process or on a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvpage.cli import remote_text
from kvpage.cli.dialogue import Dialogue, hold
from kvpage.cli.session import Stopwatch, chat_prompt, follow, open_engine, speed_note
from kvpage.cli.signals import interruptible
from kvpage.errors import EngineDeadError, RequestError
from kvpage.flags.engine import add_engine_flags, add_model_argument, add_sampling_flags, sampling_params
from kvpage.flags.parser import CommandParser
from kvpage.params import SamplingParams

if TYPE_CHECKING:
    from kvpage.engine.engine import Engine

DESCRIPTION = """\
Talk to a model that has a chat template. Each line is one message; with stdin from a pipe too.
  /system TEXT   a system message, and a new conversation    /reset   a new conversation
  /exit          leave (also Ctrl-D)                         Ctrl-C   stop the answer"""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    if remote_text.names_a_server(arguments):
        return remote_text.chat(arguments, DESCRIPTION)
    parser = CommandParser("kvpage chat", DESCRIPTION, "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--url", metavar="URL", help=remote_text.URL_HELP)
    parser.add_argument("--system", "--system-prompt", metavar="TEXT", help="a system message")
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
        return hold(conversation, namespace.quick)


class Conversation(Dialogue):
    """With a model in this process.

    A repeated beginning costs nothing: the engine finds the KV of earlier turns in its prefix cache.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None, *, stats: bool) -> None:
        self._engine, self._params, self._stats = engine, params, stats
        super().__init__(system)

    def check(self) -> None:
        """Raises RequestError at once if this model cannot chat."""
        self._engine.render_chat([{"role": "user", "content": "?"}])

    def answer(self, text: str) -> None:
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
            self._take_back(error)
            return
        self._messages.append({"role": "assistant", "content": handle.output.outputs[0].text})
        if self._stats:
            print(speed_note([handle.output], watch.seconds), file=sys.stderr)
