"""What commands share that talk to a running server: the HTTP library, its events, what it answers in error."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvpage.errors import KvpageError
from kvpage.flags.parser import UsageError

if TYPE_CHECKING:
    import httpx

DONE = "[DONE]"
CONNECT_SECONDS = 10.0
LONGEST_ERROR = 500
"""Characters of what a server says that are repeated."""


class RemoteError(KvpageError):
    """A server could not be reached, or answered with an error."""


def http_library() -> Any:
    """The module ``httpx``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("httpx")
    except ImportError:
        raise UsageError("talking to a server needs httpx: pip install 'kvpage[server]'") from None


def timeouts() -> httpx.Timeout:
    """Seconds to connect; none for an answer, which takes as long as it takes."""
    timeout: httpx.Timeout = http_library().Timeout(None, connect=CONNECT_SECONDS)
    return timeout


def key_header(api_key: str | None) -> dict[str, str]:
    """The header that carries the key: the one given, else that of OPENAI_API_KEY, else none."""
    key = api_key or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def checked_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        UsageError: it is not one of HTTP.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url!r} is no address of a server: it begins with http:// or https://")
    return url.rstrip("/")


class EventReader:
    """Server-sent events from bytes, however they were cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def push(self, piece: bytes) -> Iterator[str]:
        """The data of every event that ``piece`` completes; comments (": keep-alive") have none."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", errors="replace"))
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data = []


def read_event(data: str) -> dict[str, Any]:
    """One chunk of a streamed answer.

    Raises:
        RemoteError: it is no JSON object, or it tells an error.
    """
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise RemoteError(f"the server streamed something that is no JSON object: {data[:LONGEST_ERROR]!r}")
    if chunk.get("error"):
        raise RemoteError(f"the server ended the answer: {error_text(chunk)}")
    return chunk


def error_text(body: object) -> str:
    """What an error body says, whichever shape it has."""
    if isinstance(body, bytes):
        body = body.decode("utf-8", errors="replace")
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return " ".join(str(body).split())[:LONGEST_ERROR]
    if isinstance(body, Mapping):
        error = body.get("error", body.get("message", body.get("detail", body)))
        if isinstance(error, Mapping):
            error = error.get("message", error)
        return str(error)[:LONGEST_ERROR]
    return str(body)[:LONGEST_ERROR]


def status_text(status: int, body: str | bytes) -> str:
    """An answer that is not 200, in one line."""
    return f"HTTP {status}: {error_text(body) or 'no reason given'}"
