"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvpage_server.body import ERRORS
from kvpage_server.protocol.models import ModelCard, ModelList
from kvpage_server.replies import json_reply
from kvpage_server.service import Service

RIGHTS: dict[str, Any] = {
    "object": "model_permission", "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
    "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False, "organization": "*",
    "group": None, "is_blocking": False,
}  # fmt: skip


def router(service: Service) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models", responses={200: {"model": ModelList}, **ERRORS})
    async def list_models() -> Response:
        """Every name that the model is served under."""
        cards = [card(service, name) for name in service.settings.model_names]
        return json_reply({"object": "list", "data": cards})

    @routes.get("/v1/models/{model_id:path}", responses={200: {"model": ModelCard}, **ERRORS})
    async def retrieve_model(model_id: str) -> Response:
        """One of them; ids may hold slashes."""
        return json_reply(card(service, service.model_name(model_id)))

    return routes


def card(service: Service, name: str) -> dict[str, Any]:
    """One entry of the list."""
    created = service.created
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "kvpage",
        "root": service.settings.model_path or name,
        "parent": None,
        "max_model_len": service.max_model_len,
        "permission": [{"id": f"modelperm-{name}", "created": created, **RIGHTS}],
    }
