"""The gate before all routes: request ids, keys, limits, the count of open requests, and the last word on errors."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvpage_server.auth import OPEN_PATHS, Keys
from kvpage_server.errors import ApiError, shutting_down
from kvpage_server.replies import REQUEST_ID_KEY, usable_id
from kvpage_server.request_log import write_line
from kvpage_server.service import Service

LOG = logging.getLogger("kvpage.server")


class Gate:
    """ASGI middleware. A request that it refuses reaches no route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = Keys(service.settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        request_id = usable_id(headers.get(b"x-request-id")) or uuid.uuid4().hex
        scope[REQUEST_ID_KEY] = request_id
        reply = _Reply(send, request_id)
        counted = scope["method"] == "POST"
        service, began = self._service, time.perf_counter()
        service.load += counted
        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive), reply.send)
        except ApiError as error:
            await reply.refuse(error)
        except ClientDisconnect:
            pass  # it left before its request was whole
        except Exception:
            # What nobody expected is told to the log in full and to the client not at all.
            LOG.exception("request %s failed", request_id)
            await reply.refuse(internal_error(request_id))
        finally:
            service.load -= counted
            self._record(scope, reply, time.perf_counter() - began)

    def _record(self, scope: Scope, reply: _Reply, seconds: float) -> None:
        """Count and log a request that has ended; what only asks how the server does is neither."""
        settings = self._service.settings
        if self._path(scope) in OPEN_PATHS:
            return
        handler = getattr(scope.get("route"), "path", None)
        self._service.http.observe(scope["method"], reply.status, handler, seconds)
        if settings.log_requests:
            write_line(scope, reply.request_id, reply.status, seconds, settings.max_log_len)

    def _path(self, scope: Scope) -> str:
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", ""))

    def _check(self, scope: Scope, headers: MutableMapping[bytes, str]) -> None:
        settings = self._service.settings
        path = self._path(scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > settings.max_header_bytes:
            raise ApiError(
                431, f"the headers are larger than {settings.max_header_bytes} bytes", kind="Bad Request"
            )
        self._keys.check(path, scope["method"], headers.get(b"authorization"))
        if self._service.draining and path not in OPEN_PATHS:
            raise shutting_down()
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length[:20]) > settings.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` that counts the bytes of the body, whatever its length was said to be."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._service.settings.max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._service.settings.max_body_bytes} bytes: send less at once",
            kind="RequestTooLarge",
            headers={"Connection": "close"},
        )


class _Reply:
    """``send`` with the request's id in the headers.

    Attributes:
        status: of the answer, once it has begun.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """The error, unless an answer has begun: then nothing more can be said."""
        if self.status is not None:
            return
        body = error_bytes(error)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def error_bytes(error: ApiError) -> bytes:
    """The error object; all ASCII, for a message may quote what a client sent, lone surrogates included."""
    return json.dumps(error.body()).encode()


def internal_error(request_id: str) -> ApiError:
    """500 that tells nothing but where to look."""
    return ApiError(
        500,
        f"internal error in request {request_id}; the server's log says why",
        kind="InternalServerError",
    )


def _headers(scope: Scope) -> dict[bytes, str]:
    found: dict[bytes, Any] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, value.decode("latin-1"))
    return found
