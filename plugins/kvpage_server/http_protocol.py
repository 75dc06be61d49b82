"""uvicorn's HTTP protocol with a limit on headers, and with errors in the form of all others."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvpage_server.errors import ApiError
from kvpage_server.gate import error_bytes


def bounded_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """A protocol class that gives up on a request whose headers do not end within ``max_header_bytes``."""

    class BoundedProtocol(HttpToolsProtocol):
        """uvicorn itself keeps headers for as long as they come."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self._in_headers = False
            self._taken = 0

        def on_message_begin(self) -> None:
            """A request begins."""
            self._in_headers, self._taken = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            """Its headers are whole; the gate measures them once more."""
            self._in_headers = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            """Bytes of a request."""
            super().data_received(data)
            if self._in_headers and not self.transport.is_closing():
                self._taken += len(data)
                if self._taken > max_header_bytes:
                    self._refuse(431, f"the headers are larger than {max_header_bytes} bytes")

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP gets an answer, too."""
            self._refuse(400, msg)

        def _refuse(self, status: int, message: str) -> None:
            body = error_bytes(ApiError(status, message, kind="Bad Request"))
            phrase = "Bad Request" if status == 400 else "Request Header Fields Too Large"
            head = (
                f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return BoundedProtocol
