"""The page at /, and what it watches: /kvpage/blocks and /kvpage/plan."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib.resources import files
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

import kvpage
from kvpage import KvpageError
from kvpage_server.blocks import BlockWatch
from kvpage_server.errors import from_engine
from kvpage_server.service import Service

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""The page runs its own files and nothing else, whatever a model writes into it."""
SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "blocks.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class EngineCounts(BaseModel):
    """Counts of one moment, and of all time since the engine was made."""

    running: int = Field(description="sequences that hold a slot")
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    kv_usage: float = Field(description="share of the KV blocks in use, 0 to 1")


class GroupBlocks(BaseModel):
    """One KV group's pool."""

    index: int
    kind: str
    window: int | None
    total: int
    free: int
    used: int
    shared: int
    cached: int
    states: str = Field(
        description="runs of blocks from number 1 on: '3u1s2f'; f free, c cached, u used, s shared, a capital: "
        "held, and in the prefix index"
    )
    references: dict[str, int] = Field(description="block number -> holders, where there are several")
    filled: dict[str, int] = Field(description="block number -> tokens, where a held block is not full")


class SequenceBlocks(BaseModel):
    """One choice of a request."""

    request_id: str
    choice: int
    state: Literal["running", "waiting"]
    known: int = Field(description="tokens, prompt and generated")
    computed: int = Field(description="tokens whose K and V are in blocks")
    blocks: list[str] = Field(description="a KV group: block numbers in the order of the table, '1-3 7'")


class BlocksAnswer(BaseModel):
    """What every KV block holds at one moment."""

    version: str
    model: str
    time: float = Field(description="seconds of a clock that only goes forward")
    map_time: float = Field(description="when the block map was taken: large pools are looked at less often")
    engine: EngineCounts
    block_size: int
    groups: list[GroupBlocks]
    sequences: list[SequenceBlocks]


class PlanValue(BaseModel):
    """A value that the engine runs with."""

    name: str
    value: Any
    reason: str | None


class PlanAnswer(BaseModel):
    """Every value that the engine runs with, and why."""

    version: str
    model: str
    values: list[PlanValue]
    notes: list[str]


def router(service: Service) -> APIRouter:
    """The page's files, open to all; the two routes behind /kvpage are guarded as /v1 is."""
    routes = APIRouter()
    if not service.settings.enable_page:
        return routes
    _add_files(routes)
    facts = {"version": kvpage.__version__, "model": service.settings.model_names[0]}
    watch = BlockWatch(service.engine, facts)
    plan = PlanAnswer(**facts, **_plan(service.engine.config)).model_dump_json().encode()

    @routes.get(
        "/kvpage/blocks",
        response_model=BlocksAnswer,
        responses={200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}},
    )
    async def blocks(format: Literal["json", "svg"] = "json") -> Response:
        """The live map of KV blocks; at most a fifth of a second old, of large pools a few seconds."""
        try:
            if format == "svg":
                headers = {"Content-Security-Policy": SVG_POLICY, "Cache-Control": "no-store"}
                return Response(await watch.svg(), media_type="image/svg+xml", headers=headers)
            look = await watch.look()
        except KvpageError as error:
            raise from_engine(error) from error
        return _json(look.body)

    @routes.get("/kvpage/plan", response_model=PlanAnswer)
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


def _add_files(routes: APIRouter) -> None:
    folder = files("kvpage_server") / "page"
    for name, media_type in FILES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        answer = _file_answer((folder / name).read_bytes(), media_type)
        routes.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)


def _file_answer(body: bytes, media_type: str) -> Any:
    """An endpoint that gives ``body``, or 304 to whoever has it."""
    headers = {
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return answer
