"""Server-sent events: one task a request, text that was serialised beforehand, and an end whatever happens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpage import KvpageError, TokenEvent
from kvpage_server.errors import ApiError, from_engine, shutting_down
from kvpage_server.service import Cancellable, Service

LOG = logging.getLogger("kvpage.server")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""JSON text of a value, compact."""


class Handle(Cancellable, Protocol):
    """What ``AsyncEngine.generate`` gives, as far as a stream needs it."""

    def __aiter__(self) -> Any: ...


class ChunkWriter(Protocol):
    """Turns what choices gain into events, ready to be sent; b"" for nothing."""

    def opening(self) -> bytes:
        """Before the first chunk."""

    def chunk(self, prompt: int, event: TokenEvent) -> bytes:
        """What a choice of prompt number ``prompt`` gained."""

    def closing(self) -> bytes:
        """After the last chunk, if all went well."""


class EventStream(Response):
    """The answer of a streaming request. What goes wrong before the first event is raised, and so gets a status
    of its own; what goes wrong later is an event of the stream."""

    def __init__(
        self,
        service: Service,
        handles: Sequence[Handle],
        writer: ChunkWriter,
        headers: Mapping[str, str],
        request_id: str,
    ) -> None:
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._service, self._handles, self._writer = service, handles, writer
        self._request_id = request_id
        self._started = self._gone = self._sent = False
        self._send: Send | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; returns when the client has it, or is gone."""
        self._send = send
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._watch(receive))]
        if self._service.settings.sse_keep_alive > 0:
            tasks.append(loop.create_task(self._keep_alive(self._service.settings.sse_keep_alive)))
        try:
            await self._pump_all()
            tail = self._writer.closing() + DONE
        except Exception as error:
            # Whatever ended the request, the client is told in the form that it can still read.
            if not self._started:
                raise
            tail = self._ending(error)
        finally:
            for handle in self._handles:
                handle.cancel()
                self._service.open.discard(handle)
            for task in tasks:
                task.cancel()
        if not self._gone:
            await self._start()
            await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def _pump_all(self) -> None:
        if len(self._handles) == 1:
            await self._pump(0, self._handles[0])
            return
        loop = asyncio.get_running_loop()
        pumps = [loop.create_task(self._pump(i, handle)) for i, handle in enumerate(self._handles)]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(self, prompt: int, handle: Handle) -> None:
        write, send = self._writer.chunk, self._send
        assert send is not None, "a stream is sent once it is called"
        async for event in handle:
            reason = event.finish_reason
            if reason == "error":
                continue  # the error itself is raised at the end of the loop
            if reason == "abort":
                raise shutting_down()
            if not self._started:
                await self._start()
            data = write(prompt, event)
            if data:
                self._sent = True
                await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _start(self) -> None:
        if self._started:
            return
        self._started = True
        send = self._send
        assert send is not None, "a stream is sent once it is called"
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        opening = self._writer.opening()
        if opening:
            await send({"type": "http.response.body", "body": opening, "more_body": True})

    async def _watch(self, receive: Receive) -> None:
        """End the request when the client is gone."""
        while True:
            message: MutableMapping[str, Any] = await receive()
            if message["type"] == "http.disconnect":
                break
        self._gone = True
        for handle in self._handles:
            handle.cancel()

    async def _keep_alive(self, interval: float) -> None:
        """A comment whenever nothing was sent for a while; proxies close what is silent."""
        send = self._send
        assert send is not None, "a stream is sent once it is called"
        while True:
            self._sent = False
            await asyncio.sleep(interval)
            if not self._sent:
                await self._start()
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    def _ending(self, error: Exception) -> bytes:
        """The error as an event."""
        if isinstance(error, KvpageError):
            error = from_engine(error, overload_status=self._service.settings.overload_status)
        if not isinstance(error, ApiError):
            LOG.error("request %s failed within its stream", self._request_id, exc_info=error)
            error = ApiError(
                500, f"internal error in request {self._request_id}; the server's log says why",
                kind="InternalServerError",
            )  # fmt: skip
        return b"data: " + json.dumps(error.body()).encode() + b"\n\n" + DONE


async def outputs(service: Service, handles: Sequence[Any], receive: Receive) -> list[Any]:
    """The whole outputs of requests that are not streamed, for as long as the client waits.

    Raises:
        KvpageError: what ended one of them; the others are cancelled.
        ApiError: 503, they were cut off.
    """
    found = await results(service, handles, receive)
    if any(choice.finish_reason == "abort" for output in found for choice in output.outputs):
        raise shutting_down()
    return found


async def results(service: Service, handles: Sequence[Any], receive: Receive) -> list[Any]:
    """``outputs`` of any kind, cut off or not."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for handle in handles:
            handle.cancel()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        return [await handle.result() for handle in handles]
    finally:
        watcher.cancel()
        for handle in handles:
            handle.cancel()
            service.open.discard(handle)
