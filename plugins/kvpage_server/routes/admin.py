"""What only the server's owner may do; these routes exist with ``--enable-admin``, which needs a key."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage import ConfigError, __version__
from kvpage_server.body import ERRORS
from kvpage_server.errors import ApiError, not_implemented
from kvpage_server.replies import json_reply
from kvpage_server.service import Service

SECRET = frozenset({"api_keys"})
NO_SLEEP = "engines do not sleep yet: stop the server and start it again"
NO_LORA = "LoRA adapters have not landed yet: merge the adapter into a checkpoint and serve that"
NOT_YET = {
    ("POST", "/sleep"): NO_SLEEP,
    ("POST", "/wake_up"): NO_SLEEP,
    ("GET", "/is_sleeping"): NO_SLEEP,
    ("POST", "/collective_rpc"): "there are no workers to call, for one process runs the model",
}
"""Admin routes of vLLM that answer 501."""
NOT_YET_FOR_ANYBODY = {
    ("POST", "/v1/load_lora_adapter"): NO_LORA,
    ("POST", "/v1/unload_lora_adapter"): NO_LORA,
}
"""The same, for those who have the key of ``/v1``."""


def router(service: Service) -> APIRouter:
    """The routes, bound to a server; none where they are not enabled.

    Raises:
        ConfigError: they are enabled, and there is no key to guard them.
    """
    settings = service.settings
    routes = APIRouter(tags=["admin"])
    _refuse(routes, NOT_YET_FOR_ANYBODY)
    if not settings.enable_admin:
        return routes
    if not settings.api_keys:
        raise ConfigError("--enable-admin needs --api-key: without one, anybody could use the admin routes")
    _refuse(routes, NOT_YET)

    @routes.post("/reset_prefix_cache", responses={200: {"description": "done"}, **ERRORS})
    async def reset_prefix_cache() -> Response:
        """Forget all cached prefixes; 409 while requests hold blocks."""
        if not await asyncio.to_thread(service.engine.reset_prefix_cache):
            raise ApiError(
                409,
                "the prefix cache is in use: try again when no request runs",
                kind="ConflictError",
                headers={"Retry-After": "1"},
            )
        return Response()

    @routes.get("/server_info", responses={200: {"description": "settings and values in use"}, **ERRORS})
    async def server_info() -> Response:
        """What the server and its engine run with."""
        shown = {
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(settings)
            if field.name not in SECRET
        }
        config = service.engine.config
        engine = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return json_reply({"version": __version__, "server": shown, "engine": engine})

    return routes


def _refuse(routes: APIRouter, table: Mapping[tuple[str, str], str]) -> None:
    """Routes that answer 501; they stand in no document, for there is nothing to be had from them."""
    for (method, path), reason in table.items():
        routes.add_api_route(path, _refusal(path, reason), methods=[method], include_in_schema=False)


def _refusal(path: str, reason: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def refuse(request: Request) -> Response:
        raise not_implemented(f"{path}: {reason}")

    return refuse
