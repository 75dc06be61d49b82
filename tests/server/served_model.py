"""A server of the tiny model with an engine of its own, and the official client of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from live_server import MODEL, live_server, refused

from kvpage import AsyncEngine
from kvpage_server.service import Service

KEY = "a-key"


@dataclass(frozen=True)
class ServedModel:
    """Its parts, and clients of it that send ``KEY``."""

    service: Service
    http: httpx.Client
    client: openai.OpenAI

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body, lone surrogates and all."""
        return self.http.post(
            path, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )

    def refusal(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        """(status, param, message) of an error that is answered."""
        answer = self.post(path, **body)
        error = refused(answer, answer.status_code)
        return answer.status_code, error["param"], error["message"]


@contextmanager
def serving(folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[ServedModel]:
    """A server of the model in ``folder`` until the block ends; then every KV block must be free."""
    running = AsyncEngine(
        folder, **{"num_kv_blocks": 64, "block_size": 16, "max_num_seqs": 8, **(engine or {})}
    )
    try:
        with live_server(running, **settings) as server:
            server.client.headers["authorization"] = f"Bearer {KEY}"
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30.0
            ) as client:
                yield ServedModel(server.service, server.client, client)
                server.wait_until_idle()
    finally:
        running.close()


__all__ = ["KEY", "MODEL", "ServedModel", "serving"]
