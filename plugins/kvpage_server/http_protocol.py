"""uvicorn's HTTP protocol with limits on headers and time, and with errors in the form of all others."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvpage_server.errors import ApiError
from kvpage_server.gate import error_bytes

HEADER_SECONDS = 60.0
"""In which a request's headers must come, and a new connection's first ones."""
BODY_SECONDS = 600.0
"""In which a body must be whole; 16 MB then come at 28 kB/s."""

CHUNK_OVERHEAD = 8
"""Bytes that come for one of a body; chunks of a single byte take six."""


class _BoundedProtocol(HttpToolsProtocol):
    """uvicorn itself keeps headers for as long as they come."""

    max_header_bytes: int

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._in_headers = False
        self._taken = self._body = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that says nothing is not waited for."""
        super().connection_made(transport)
        self._wait_at_most(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._wait_at_most(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_headers, self._taken, self._body = True, 0, 0
        self._wait_at_most(HEADER_SECONDS)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; what comes after a body (a trailer) is left out, for nobody has measured it."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its headers are whole; the gate measures them once more."""
        self._in_headers, self._taken = False, 0
        self._wait_at_most(BODY_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole; its answer may take as long as it likes."""
        self._wait_at_most(None)
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        if self._deadline is None or self.transport.is_closing():
            return
        self._taken += len(data)
        if self._in_headers and self._taken > self.max_header_bytes:
            self._refuse(431, f"the headers are larger than {self.max_header_bytes} bytes")
        elif self._taken > CHUNK_OVERHEAD * self._body + self.max_header_bytes and not self._in_headers:
            self._refuse(413, "the body has more chunk extensions and trailers than contents")

    def on_body(self, body: bytes) -> None:
        """A piece of the body; the gate counts them."""
        self._body += len(body)
        super().on_body(body)

    def _wait_at_most(self, seconds: float | None) -> None:
        """For the part of a request that comes now; ``None`` = no part is under way."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self.pipeline:  # we do not read on before an earlier request is answered
            self._wait_at_most(BODY_SECONDS)
        else:
            self._refuse(408, "the request did not come in time")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer, too."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = error_bytes(ApiError(status, message, kind="Bad Request"))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        begun = self.cycle is not None and self.cycle.response_started
        if not begun or self.cycle.response_complete:
            self.transport.write(head.encode() + body)
        self.transport.close()  # a route that reads the body sees its client go


def bounded_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """A protocol class that gives up on a request whose headers do not end within ``max_header_bytes``."""
    return type("BoundedProtocol", (_BoundedProtocol,), {"max_header_bytes": max_header_bytes})
