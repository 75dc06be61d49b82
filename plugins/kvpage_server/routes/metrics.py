"""GET /metrics: what Prometheus scrapes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from kvpage_server.exposition import MEDIA_TYPE, Exposition, LatestSnapshot, prefixes
from kvpage_server.service import Service

PATIENCE = 2.0
"""Seconds that a scrape waits for the step that runs; Prometheus gives up after ten."""
ENGINE = "0"
"""The label ``engine``; a server has one."""


def router(service: Service) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter()
    labels = {"model_name": service.settings.model_names[0], "engine": ENGINE}
    exposition = Exposition(prefixes(service.settings.metrics_prefix), labels)
    latest = LatestSnapshot(service.engine)

    @routes.get(
        "/metrics",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text format."""
        snapshot = await latest.get(PATIENCE)
        text = await asyncio.to_thread(exposition.render, snapshot or (), service.http.families())
        return Response(text, headers={"content-type": MEDIA_TYPE})

    return routes
