"""A real server on a free port, in a thread of the test's process, and what tests ask of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from kvpage import AsyncEngine, PluginRegistry
from kvpage_server.app import create_app
from kvpage_server.http_protocol import bounded_protocol
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

MODEL = "org/tiny"


@dataclass(frozen=True, slots=True)
class LiveServer:
    """``url`` without a slash at the end; ``service`` to look inside."""

    url: str
    port: int
    service: Service
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        return answered(self.post("/v1/completions", {"prompt": "The block", "temperature": 0, **body}))

    def chat(self, **body: Any) -> dict[str, Any]:
        return answered(self.post("/v1/chat/completions", {**HELLO, "temperature": 0, **body}))

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of every event, parsed; "[DONE]" as text."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            text = response.read().decode()
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        return [event if event == "[DONE]" else json.loads(event) for event in events]

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Until no request is open and no block is held; fails if that does not come."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.service.engine.stats()
            if not (self.service.load or stats.running or stats.waiting or stats.used_blocks):
                assert not self.service.open
                return
            assert time.monotonic() < deadline, (self.service.load, stats)
            time.sleep(0.01)


HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a refusal, which must have OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@contextmanager
def live_server(engine: AsyncEngine, **settings: Any) -> Iterator[LiveServer]:
    """Serve ``engine``; the server ends with the block, the engine goes on."""
    given = ServerSettings(model_names=(MODEL, "alias"), model_path="somewhere/tiny", **settings)
    service = Service(engine, given, PluginRegistry(entry_points=False))
    config = uvicorn.Config(
        create_app(service), port=0, lifespan="off", ws="none", log_config=None, access_log=False,
        http=bounded_protocol(given.max_header_bytes), timeout_graceful_shutdown=1, root_path=given.root_path,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server-under-test")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            yield LiveServer(url, port, service, client)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
