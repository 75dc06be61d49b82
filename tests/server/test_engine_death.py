"""Exceptions of plugins: what one request causes ends it alone, what a step causes ends the engine, and says so."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from live_server import LiveServer, answered, live_server, refused

from kvpage import AsyncEngine, PluginRegistry, hookimpl
from kvpage.api.records import LogitsProcessorRecord
from kvpage.api.sampling import LogitsProcessor

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "The block", "max_tokens": 60, "ignore_eos": True}
DYING = """
import sys
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.cli.main import main
attend, calls = ReferenceAttention.attend, []
def failing(self, *arguments, **keywords):
    calls.append(1)
    if len(calls) > 60:
        raise RuntimeError("the device is gone")
    return attend(self, *arguments, **keywords)
ReferenceAttention.attend = failing
sys.exit(main(["serve", *sys.argv[1:]]))
"""


class Clumsy(LogitsProcessor):
    """Fails in the third step of a request."""

    def __init__(self) -> None:
        self._steps = 0

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        self._steps += 1
        if self._steps == 3:
            raise RuntimeError("clumsy")
        return logits


@hookimpl
def kvpage_logits_processors() -> list[LogitsProcessorRecord]:
    return [LogitsProcessorRecord(name="clumsy", factory="test_engine_death:Clumsy")]


def test_what_one_request_causes_ends_that_request_alone(tiny: Path) -> None:
    plugin = SimpleNamespace(kvpage_logits_processors=kvpage_logits_processors)
    engine = AsyncEngine(tiny, num_kv_blocks=64, plugins=PluginRegistry([plugin], entry_points=False))
    try:
        with live_server(engine) as server:
            good, bad = asyncio.run(_side_by_side(server))
            assert answered(good)["usage"]["completion_tokens"] == 60
            error = bad.json()["error"]
            assert bad.status_code in (400, 500)
            assert error["code"] == bad.status_code
            assert "Traceback" not in error["message"]
            assert server.client.get("/health").status_code == 200
            server.wait_until_idle()
    finally:
        engine.close()


async def _side_by_side(server: LiveServer) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
        bad = {**LONG, "logits_processors": ["clumsy"]}
        return list(await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in (LONG, bad))))


@pytest.mark.parametrize("flags", [(), ("--keep-alive-on-engine-death",)], ids=["ends", "stays"])
def test_a_step_that_fails_ends_every_open_request_and_then_the_process(
    tiny: Path, flags: tuple[str, ...]
) -> None:
    command = [sys.executable, "-c", DYING, str(tiny), "--port", "0", "--num-kv-blocks", "64", *flags]
    command += ["--attention-backend", "reference", "--shutdown-timeout", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("kvpage serving")), "")
            responses = asyncio.run(_several(line.split()[-1]))
            for response in responses:
                assert refused(response, 500)["type"] == "EngineDeadError"
                assert "device is gone" not in response.text
            if not flags:
                assert process.wait(timeout=10) == 1
                return
            url = line.split()[-1]
            refused(httpx.post(url + COMPLETIONS, json=LONG, trust_env=False), 500)
            assert httpx.get(url + "/health", trust_env=False).status_code == 503
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=10)
        finally:
            process.kill()


async def _several(url: str) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        return list(await asyncio.gather(*(client.post(COMPLETIONS, json=LONG) for _ in range(4))))
