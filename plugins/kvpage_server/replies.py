"""Answers as bytes, and the ids that requests go by."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvpage_server.streams import dumps

REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
REQUEST_ID_KEY = "kvpage.request_id"
"""In the ASGI scope: the id that the gate gave the request."""


def json_reply(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """200."""
    return Response(dumps(body).encode(), media_type="application/json", headers=dict(headers or {}))


def usable_id(text: str | None) -> str | None:
    """An id that a client brought, if it can stand in a header, a log line and an answer."""
    return text if text is not None and REQUEST_ID.fullmatch(text) else None


def new_answer_id(kind: str, request: Request, asked: str | None) -> str:
    """``kind`` + the id: the header's, else the body's, else a random one."""
    own = usable_id(request.headers.get("x-request-id")) or usable_id(asked)
    return f"{kind}-{own or request.scope.get(REQUEST_ID_KEY) or uuid.uuid4().hex}"
