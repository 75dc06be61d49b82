"""The page at /, and what it watches: /kvpage/blocks and /kvpage/plan."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import kvpage
from kvpage_server.blocks import BlockWatch
from kvpage_server.body import ERRORS
from kvpage_server.page import FILES, POLICY
from kvpage_server.protocol.blocks import BlocksAnswer, PlanAnswer
from kvpage_server.service import Service

SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
KEY_MARK = b'name="kvpage-key" content="%s"'
"""In index.html: whether to ask for a key before anything else."""
SVG = {"image/svg+xml": {"schema": {"type": "string"}}}


def router(service: Service) -> APIRouter:
    """The page's files, open to all, and the two routes behind it, guarded as /v1 is."""
    routes = APIRouter(tags=["page"])
    if not service.settings.enable_page:
        return routes
    _add_files(routes, needs_key=bool(service.settings.api_keys))
    facts: dict[str, Any] = {"version": kvpage.__version__, "model": service.settings.model_names[0]}
    watch = BlockWatch(service.engine, facts)
    plan = PlanAnswer(**facts, **_plan(service.engine.config)).model_dump_json().encode()

    @routes.get("/kvpage/blocks", responses={200: {"model": BlocksAnswer, "content": SVG}, **ERRORS})
    async def show_blocks(format: Literal["json", "svg"] = "json") -> Response:
        """The live map of KV blocks; at most a fifth of a second old, that of large pools a few seconds."""
        if format == "svg":
            headers = {"Content-Security-Policy": SVG_POLICY, "Cache-Control": "no-store"}
            return Response(await watch.svg(), media_type="image/svg+xml", headers=headers)
        return _json((await watch.look()).body)

    @routes.get("/kvpage/plan", responses={200: {"model": PlanAnswer}, **ERRORS})
    async def show_plan() -> Response:
        """Every value that the engine runs with, and why."""
        return _json(plan)

    return routes


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


def _plan(config: Any) -> dict[str, Any]:
    """``config``: a Resolved."""
    reasons = dict(config.reasons)
    for name in ("num_blocks", "kv_bytes"):
        reasons.setdefault(name, reasons.get("kv_memory"))
    values = [
        {"name": field.name, "value": getattr(config, field.name), "reason": reasons.get(field.name)}
        for field in dataclasses.fields(config)
        if field.name not in ("reasons", "notes")
    ]
    return {"values": values, "notes": list(config.notes)}


def _add_files(routes: APIRouter, *, needs_key: bool) -> None:
    folder = files("kvpage_server.page")
    for path, (name, media_type) in FILES.items():
        body = (folder / name).read_bytes()
        if needs_key:
            body = body.replace(KEY_MARK % b"none", KEY_MARK % b"needed")
        answer = _file_answer(body, media_type)
        routes.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)


def _file_answer(body: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that gives ``body``, or 304 to whoever has it."""
    headers = {
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return answer
