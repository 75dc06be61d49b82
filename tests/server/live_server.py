"""A real server around the tiny model, on a port of its own, in a thread of the test's process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from kvpage import AsyncEngine, PluginRegistry
from kvpage_server.app import create_app
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings
from tiny_checkpoint import write_checkpoint

KEY = "a-key"


@dataclass(frozen=True)
class LiveServer:
    """Where it listens, and clients of it."""

    url: str
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
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == answer.status_code
        return answer.status_code, error["param"], error["message"]


@contextmanager
def serving(folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[LiveServer]:
    """A server of the model in ``folder`` until the block ends; afterwards every KV block must be free."""
    options: dict[str, Any] = {"num_kv_blocks": 64, "block_size": 16, "max_num_seqs": 8, **(engine or {})}
    registry = PluginRegistry(entry_points=False)
    running = AsyncEngine(folder, plugins=registry, **options)
    service = Service(
        running, ServerSettings(model_names=("tiny",), model_path=str(folder), **settings), registry
    )
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    headers = {"authorization": f"Bearer {KEY}"}
    try:
        with (
            httpx.Client(base_url=url, headers=headers, timeout=30.0) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=30.0) as client,
        ):
            yield LiveServer(url, service, http, client)
    finally:
        server.should_exit = True
        thread.join(timeout=10.0)
        stats = running.stats()
        running.close()
    assert not thread.is_alive()
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def write_tiny(folder: Path) -> Path:
    """The folder of a random Llama with tokenizer and chat template."""
    return write_checkpoint(folder)
