"""A server of OpenAI's API for the commands that talk to one: it says what it was told to, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stub-model"


@dataclass
class Stub:
    """What a test sets, and what it reads.

    Attributes:
        pieces: the text of each chunk. refuse: "custom status, message" of requests, instead of an answer.
        break_after: the stream ends in an error after so many chunks.
        seen: (path, headers, body) of every POST, in order of arrival. most: POSTs answered at once.
    """

    root: str = MODEL
    pieces: tuple[str, ...] = ("one", " two", " three")
    refuse: tuple[int, str] | None = None
    refusals: int = -1
    break_after: int | None = None
    usage: bool = True
    port: int = 0
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def chunks(stub: Stub, path: str) -> Iterator[dict[str, Any]]:
    chat = path.endswith("chat/completions")
    if chat:
        yield {
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        }
    for index, piece in enumerate(stub.pieces):
        if index == stub.break_after:
            yield {"error": {"message": "the step failed", "type": "InternalServerError", "code": 500}}
            return
        yield {
            "choices": [
                {"index": 0, "finish_reason": None, **({"delta": {"content": piece}} if chat else {"text": piece})}
            ]
        }  # fmt: skip
    last = {"delta": {}} if chat else {"text": ""}
    yield {"choices": [{"index": 0, "finish_reason": "stop", **last}]}
    if stub.usage:
        yield {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(stub.pieces)}}


def handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *arguments: object) -> None:
            pass

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(200, {"data": [{"id": MODEL, "root": stub.root}]})
            else:
                self.answer(404, {"error": {"message": "no such path"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                stub.running += 1
                stub.most = max(stub.most, stub.running)
                refused = stub.refuse is not None and stub.refusals != 0
                stub.refusals -= refused
            try:
                if refused:
                    assert stub.refuse is not None
                    status, message = stub.refuse
                    self.answer(status, {"error": {"message": message}})
                else:
                    self.stream()
            finally:
                with stub.lock:
                    stub.running -= 1

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks(stub, self.path)]
            for event in (": keep-alive\n\n", *events, "data: [DONE]\n\n"):
                data = event.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

    return Handler


@contextmanager
def serving(**options: Any) -> Iterator[Stub]:
    """A stub that listens while the block runs."""
    stub = Stub(**options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stub))
    server.daemon_threads = True
    stub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
