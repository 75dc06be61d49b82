"""The application: routes behind the gate. Making it has no effect outside it, so a program may mount it itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from kvpage import KvpageError, PluginError, __version__
from kvpage.plugins import load
from kvpage_server.errors import ApiError, from_engine
from kvpage_server.gate import Gate, error_bytes
from kvpage_server.routes import (
    admin,
    chat,
    completions,
    embeddings,
    health,
    metrics,
    models,
    page,
    responses,
    tokenize,
)
from kvpage_server.service import Service

ROUTERS: tuple[Callable[[Service], APIRouter], ...] = (
    completions.router,
    chat.router,
    responses.router,
    embeddings.router,
    tokenize.router,
    models.router,
    health.router,
    metrics.router,
    admin.router,
    page.router,
)
"""Every group of routes."""


def create_app(service: Service) -> FastAPI:
    """The server as an ASGI application. The engine stays the caller's: closing the application leaves it open."""
    settings = service.settings
    docs = settings.enable_docs
    app = FastAPI(
        title="kvpage",
        version=__version__,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        redirect_slashes=False,
    )
    for router in ROUTERS:
        app.include_router(router(service))
    for route in extra_routes(service):
        app.include_router(route)
    _answer_errors(app, service)
    app.add_middleware(Gate, service=service)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=settings.allow_credentials,
        )
    _hoist_schemas(app)
    return app


def extra_routes(service: Service) -> list[APIRouter]:
    """The routes of other plugins that ``enable_routes`` names.

    Raises:
        PluginError: there is no such record, or it cannot be loaded.
    """
    wanted = service.settings.enable_routes
    if not wanted:
        return []
    found = {record.name: record for record in service.registry.records("kvpage_server_routes")}
    missing = [name for name in wanted if name not in found]
    if missing:
        known = ", ".join(sorted(found)) or "none"
        raise PluginError(f"no plugin has routes named {missing[0]!r}; there are {known}")
    return [load(found[name])(service) for name in wanted]


def _answer_errors(app: FastAPI, service: Service) -> None:
    """Whatever a route raises becomes the error object."""

    def reply(error: ApiError) -> Response:
        return Response(
            error_bytes(error), error.status, headers=error.headers, media_type="application/json"
        )

    async def refused(request: Request, error: Exception) -> Response:
        return reply(cast(ApiError, error))

    async def engine_refused(request: Request, error: Exception) -> Response:
        failed = cast(KvpageError, error)
        return reply(from_engine(failed, overload_status=service.settings.overload_status))

    async def no_such_route(request: Request, error: Exception) -> Response:
        known = cast(HTTPException, error)
        kinds = {404: "Not Found", 405: "Method Not Allowed"}
        return reply(
            ApiError(
                known.status_code,
                f"{request.method} {request.url.path[:200]}: {known.detail}",
                kind=kinds.get(known.status_code, "Bad Request"),
                headers=dict(known.headers or {}),
            )
        )

    async def invalid(request: Request, error: Exception) -> Response:
        problems = cast(RequestValidationError, error).errors()
        place = ".".join(str(part) for part in problems[0]["loc"]) if problems else None
        text = "; ".join(str(problem["msg"]) for problem in problems[:10])
        return reply(
            ApiError(400, f"{len(problems)} validation error(s): {text}", kind="Bad Request", param=place)
        )

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(KvpageError, engine_refused)
    app.add_exception_handler(HTTPException, no_such_route)
    app.add_exception_handler(RequestValidationError, invalid)


def _hoist_schemas(app: FastAPI) -> None:
    """Routes that read their body themselves bring its schema along; in the document it stands with the others."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # what FastAPI adds; here it is a 400
                    content = operation.get("requestBody", {}).get("content", {})
                    schema = content.get("application/json", {}).get("schema", {})
                    schemas.update(schema.pop("$defs", {}))
        return cast("dict[str, Any]", app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]
