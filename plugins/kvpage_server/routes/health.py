"""What load balancers and people ask first: /health, /ping, /version, /load."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvpage import EngineDeadError, __version__
from kvpage_server.body import ERRORS
from kvpage_server.protocol.models import Load, Version
from kvpage_server.replies import json_reply
from kvpage_server.service import Service


def router(service: Service) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["health"])
    states: dict[int | str, dict[str, Any]] = {
        200: {"description": "requests are answered"},
        503: {"description": "they are not"},
    }

    @routes.get("/health", responses=states, response_class=Response)
    @routes.get("/ping", responses=states, response_class=Response)
    @routes.post("/ping", responses=states, response_class=Response)
    async def health() -> Response:
        """200 with no body while requests are answered; 503 once the engine is dead or the server drains."""
        try:
            service.engine.check_health()
        except EngineDeadError:
            return Response(status_code=503)
        return Response(status_code=503 if service.draining else 200)

    @routes.get("/version", responses={200: {"model": Version}})
    async def version() -> Response:
        """kvpage's version."""
        return json_reply({"version": __version__})

    @routes.get("/load", responses={200: {"model": Load}, **ERRORS})
    async def load() -> Response:
        """Requests being answered now."""
        return json_reply({"server_load": service.load})

    return routes
