"""Requests from a file: each line is asked of the application, answers keep the order of the lines.

Formats are those of OpenAI's batch files. A line is
``{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}``, its answer
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import httpx
from fastapi import FastAPI

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
NOT_STREAMED = "a batch is answered whole: leave stream out"


class LineError(Exception):
    """A line that asks for nothing that can be answered; ``custom_id`` is its own, where it has one."""

    def __init__(self, message: str, custom_id: str | None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line that was read. ``body`` is JSON text."""

    custom_id: str
    url: str
    body: str


@dataclass(slots=True)
class BatchCount:
    """Lines that were answered with 200, and those that were not."""

    answered: int = 0
    failed: int = 0


def read_lines(file: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """The lines of a file but the blank ones; ``None`` for one of more than ``longest`` bytes, which is skipped."""
    while line := file.readline(longest + 2):
        if len(line.rstrip(b"\r\n")) > longest:
            while not line.endswith(b"\n") and (line := file.readline(longest)):
                pass
            yield None
        elif line.strip():
            yield line


def parse_line(line: bytes) -> BatchRequest:
    """One line.

    Raises:
        LineError: it is no request, and why.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise LineError("the line is not JSON", None) from None
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    if not isinstance(custom_id, str):
        raise LineError('the line must be a JSON object with a "custom_id" that is text', None)
    url, body = data.get("url"), data.get("body")
    if data.get("method", "POST") != "POST":
        raise LineError(f'"method" must be "POST", got {data["method"]!r:.80}', custom_id)
    if url not in URLS:
        raise LineError(f'"url" must be one of {", ".join(URLS)}, got {url!r:.80}', custom_id)
    if not isinstance(body, dict):
        raise LineError('"body" must be an object: what would be sent to the url', custom_id)
    if body.get("stream"):
        raise LineError(NOT_STREAMED, custom_id)
    return BatchRequest(custom_id, url, json.dumps(body))


async def answer_file(
    app: FastAPI, source: BinaryIO, write: Callable[[dict[str, Any]], None], *, at_once: int, longest: int
) -> BatchCount:
    """Answer every line of ``source``, in its order; ``write`` is called with each answer as soon as all before it
    are written. What is answered when the task is cancelled is written too.

    Args:
        at_once: lines under way or waiting to be written; bounds what is held in memory.
        longest: most bytes of a line.
    """
    count = BatchCount()

    def put(answer: dict[str, Any]) -> None:
        good = answer["error"] is None
        count.answered, count.failed = count.answered + good, count.failed + (not good)
        write(answer)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    under_way: deque[asyncio.Task[dict[str, Any]]] = deque()
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
        try:
            for line in read_lines(source, longest):
                under_way.append(asyncio.ensure_future(_answer(client, line, longest)))
                while under_way and (len(under_way) >= at_once or under_way[0].done()):
                    await under_way[0]
                    put(under_way.popleft().result())
                await asyncio.sleep(0)
            while under_way:
                await under_way[0]
                put(under_way.popleft().result())
        finally:
            for task in under_way:
                if not task.cancel() and not task.cancelled() and task.exception() is None:
                    put(task.result())
    return count


async def _answer(client: httpx.AsyncClient, line: bytes | None, longest: int) -> dict[str, Any]:
    try:
        if line is None:
            raise LineError(f"the line is longer than {longest} bytes", None)
        request = parse_line(line)
    except LineError as error:
        return _entry(error.custom_id, 400, uuid.uuid4().hex, None, _told(400, "BadRequestError", str(error)))
    response = await client.post(
        request.url, content=request.body.encode(), headers={"Content-Type": "application/json"}
    )
    status = response.status_code
    try:
        body = response.json()
        error_told = None if status == 200 else body["error"]
    except (ValueError, LookupError, TypeError):  # of a route that is not the server's own
        body, error_told = (
            None,
            _told(status, "InternalServerError", f"answered with {status} and no error object"),
        )
    request_id = response.headers.get("x-request-id") or uuid.uuid4().hex
    return _entry(request.custom_id, status, request_id, body, error_told)


def _told(status: int, kind: str, message: str) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": status}


def _entry(
    custom_id: str | None, status: int, request_id: str, body: Any, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": error,
    }
