"""``kvpage chat --url`` and ``kvpage complete --url``: text from a running server, as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvpage.cli.dialogue import Dialogue, hold, read_line
from kvpage.cli.main import OK
from kvpage.cli.remote import (
    DONE,
    EventReader,
    RemoteError,
    checked_url,
    http_library,
    key_header,
    read_event,
    status_text,
    timeouts,
)
from kvpage.cli.session import Stopwatch, counted
from kvpage.flags.fields import add_flags, given
from kvpage.flags.parser import CommandParser, UsageError, normalise
from kvpage.params import SamplingParams

URL_HELP = "a running server in place of a model here, such as http://localhost:8000/v1; with its own flags: add --help"
HERE_ONLY = ("n", "detokenize", "timeout", "logprobs", "prompt_logprobs", "logits_processors", "extra_args")
"""Sampling parameters that are of no use in a terminal, or that a server knows by another name."""


def names_a_server(arguments: Sequence[str]) -> bool:
    """Whether the command line names a server."""
    return any(normalise(argument).partition("=")[0] == "--url" for argument in arguments)


def chat(arguments: Sequence[str], description: str) -> int:
    """``kvpage chat --url``."""
    parser = _parser("kvpage chat", description, "-q", "--quick", text="ask this one thing and leave")
    parser.add_argument("--system-prompt", "--system", dest="system", metavar="TEXT", help="a system message")
    namespace = parser.parse_arguments(arguments)
    with _Server(namespace) as server:
        conversation = _RemoteConversation(server, namespace.system)
        return hold(conversation, namespace.quick)


def complete(arguments: Sequence[str], description: str) -> int:
    """``kvpage complete --url``."""
    parser = _parser("kvpage complete", description, "-q", "--quick", text="the same as PROMPT")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text; without one, each line of stdin")
    namespace = parser.parse_arguments(arguments)
    prompts = [*namespace.prompts, *([] if namespace.quick is None else [namespace.quick])]
    with _Server(namespace) as server:
        typed = not prompts and sys.stdin is not None and sys.stdin.isatty()
        for prompt in prompts or _lines():
            server.write("/completions", {"prompt": prompt}, stop_at_interrupt=typed)
    return OK


def _lines() -> Iterator[str]:
    if sys.stdin is None:
        raise UsageError("standard input is closed: give a PROMPT")
    interactive = sys.stdin.isatty()
    if interactive:
        print("type a text to go on with; Ctrl-D leaves, Ctrl-C stops an answer", file=sys.stderr)
    while (line := read_line(interactive)) is not None:
        if line:
            yield line


def _parser(prog: str, description: str, *quick: str, text: str) -> CommandParser:
    parser = CommandParser(prog, description, "--url URL")
    parser.add_argument(
        "--url", metavar="URL", required=True, help="of the server, such as http://localhost:8000/v1"
    )
    parser.add_argument(
        "--model-name", "--model", dest="model", metavar="NAME", help="[the server's first model]"
    )
    parser.add_argument("--api-key", metavar="KEY", help="[that of OPENAI_API_KEY]")
    parser.add_argument(*quick, metavar="TEXT", help=text)
    parser.add_argument("--stats", action="store_true", help="tokens and times on stderr after each answer")
    add_flags(
        parser, SamplingParams, title="sampling", skip=HERE_ONLY, defaults={"max_tokens": "the server's"}
    )
    return parser


class _Server:
    """A server by its address, and the model of it that is asked."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        http = http_library()
        url = checked_url(namespace.url)
        self._url = url if http.URL(url).path.strip("/") else f"{url}/v1"
        self._errors = http.HTTPError, http.InvalidURL
        self._stats, self._sampling = namespace.stats, given(namespace, SamplingParams, skip=HERE_ONLY)
        self._client = http.Client(headers=key_header(namespace.api_key), timeout=timeouts())
        self._model = namespace.model

    def __enter__(self) -> _Server:
        if self._model is None:
            self._model = self._first_model()
            print(f"model: {self._model}", file=sys.stderr)
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def write(self, path: str, asked: Mapping[str, Any], *, stop_at_interrupt: bool) -> tuple[str, bool]:
        """Print an answer as it comes; its text, and whether Ctrl-C ended it.

        Raises:
            RemoteError: there is none, or it ends in error.
            KeyboardInterrupt: where ``stop_at_interrupt`` is not set.
        """
        watch, text, interrupted = Stopwatch(), "", False
        first: float | None = None
        usage: Mapping[str, Any] = {}
        try:
            for chunk in self._chunks(path, asked):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    piece = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                    if piece:
                        first = watch.seconds if first is None else first
                        text += piece
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not stop_at_interrupt:
                raise
            interrupted = True
        print()
        if self._stats:
            print(_note(usage, first, watch.seconds), file=sys.stderr)
        return text, interrupted

    def _chunks(self, path: str, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        usage = {"stream_options": {"include_usage": True}} if self._stats else {}
        body = {"model": self._model, "stream": True, **usage, **self._sampling, **asked}
        reader = EventReader()
        try:
            with self._client.stream("POST", self._url + path, json=body) as response:
                if response.status_code != 200:
                    raise RemoteError(status_text(response.status_code, response.read()))
                for piece in response.iter_bytes():
                    for data in reader.push(piece):
                        if data == DONE:
                            return
                        yield read_event(data)
        except self._errors as error:
            raise self._unreachable(error) from error

    def _first_model(self) -> str:
        try:
            response = self._client.get(f"{self._url}/models")
            if response.status_code != 200:
                raise RemoteError(
                    f"{self._url}/models: {status_text(response.status_code, response.content)}"
                )
            return str(response.json()["data"][0]["id"])
        except self._errors as error:
            raise self._unreachable(error) from error
        except (ValueError, LookupError, TypeError):
            raise RemoteError(f"{self._url}/models names no model: give --model-name") from None

    def _unreachable(self, error: Exception) -> RemoteError:
        return RemoteError(
            f"{self._url}: {error or type(error).__name__}; is the server up? (kvpage serve MODEL)"
        )


def _note(usage: Mapping[str, Any], first: float | None, seconds: float) -> str:
    """One line on what an answer cost."""
    tokens = int(usage.get("completion_tokens") or 0)
    delay = "" if first is None else f", first token after {1000 * first:.0f} ms"
    prompt = counted(int(usage.get("prompt_tokens") or 0), "prompt token")
    return f"{prompt}, {tokens} new in {seconds:.2f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s{delay}"


class _RemoteConversation(Dialogue):
    """With a model on a server."""

    def __init__(self, server: _Server, system: str | None) -> None:
        self._server = server
        super().__init__(system)

    def answer(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        try:
            said, self.interrupted = self._server.write(
                "/chat/completions", {"messages": self._messages}, stop_at_interrupt=True
            )
        except RemoteError as error:
            self._take_back(error)
            return
        self._messages.append({"role": "assistant", "content": said})
