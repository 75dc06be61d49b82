"""What the HTTP server itself costs: chunks a second over many streams, and the time from a request to its submission.

    python benchmarks/server_overhead.py [--streams 64] [--tokens 400] [--rounds 5] [--step-ms 2] [--chat] [--output FILE]

The model is a dummy that computes nothing: every step gives one token to each running sequence and sleeps, as a model
that computes elsewhere would (--step-ms 0: does not; then tokens come faster than they can be told one by one, and
each chunk holds many). Scheduler, detokenizer, engine thread and server run as they are, in one process; the clients
are another process that reads raw sockets and counts events. Each round opens all streams anew. The output is JSON:
per round chunks a second, tokens a second and tokens a chunk; the server's own CPU time a chunk (engine included),
which tells more than rates do on a machine that others use too; and milliseconds from the application's call to the
engine's ``generate``, median and 99th percentile, for requests that come all at once and for requests that come alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from kvpage import AsyncEngine, PluginRegistry
from kvpage.sched.plan import StepPlan, StepResult
from kvpage_server.app import create_app
from kvpage_server.http_protocol import bounded_protocol
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

ALONE = 100
PATHS = {False: "/v1/completions", True: "/v1/chat/completions"}


class InstantModel:
    """Stands in for the executor: random token ids, no arithmetic; ``seconds`` of sleep a step."""

    def __init__(self, vocabulary: int, seconds: float) -> None:
        self._seconds = seconds
        draw = random.Random(0)
        self._tokens = [draw.randrange(300, vocabulary) for _ in range(4096)]
        self._next = 0

    def submit(self, plan: StepPlan) -> InstantModel:
        count = len(plan.sample_slots)
        self._next = (self._next + count) % 2048
        if self._seconds:
            time.sleep(self._seconds)
        self._result = StepResult(token_ids=self._tokens[self._next : self._next + count])
        return self

    def result(self) -> StepResult:
        return self._result

    def close(self) -> None:
        """Nothing to give back."""


@dataclass
class Stopwatch:
    """Between the application's call and the engine's: the ASGI application around the real one."""

    app: Any
    began: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.began[id(asyncio.current_task())] = time.perf_counter()
        await self.app(scope, receive, send)

    def watch(self, engine: AsyncEngine) -> None:
        """Note when ``engine.generate`` has been called."""
        generate = engine.generate

        def timed(*arguments: Any, **keywords: Any) -> Any:
            handle = generate(*arguments, **keywords)
            self.seconds.append(time.perf_counter() - self.began.pop(id(asyncio.current_task())))
            return handle

        engine.generate = timed  # type: ignore[method-assign]


def request(tokens: int, chat: bool) -> bytes:
    """A streaming request for ``tokens`` tokens."""
    prompt = "What is a KV cache, and why does it grow with every token that a model writes?"
    body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    content = json.dumps(body).encode()
    head = f"POST {PATHS[chat]} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    return head.encode() + f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


async def read_stream(port: int, content: bytes) -> int:
    """Events of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content)
    count = 0
    tail = b""
    while block := await reader.read(2**18):
        count += (tail[-5:] + block).count(b"data: ")
        tail = block
    writer.close()
    assert b"[DONE]" in tail, tail
    return count - 1


async def clients(port: int, streams: int, tokens: int, rounds: int, chat: bool) -> list[dict[str, float]]:
    """Rates of each round; no rounds at all: requests that come alone."""
    for _ in range(0 if rounds else ALONE):
        await read_stream(port, request(1, chat))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        counts = await asyncio.gather(*(read_stream(port, request(tokens, chat)) for _ in range(streams)))
        seconds = time.perf_counter() - began
        found.append(
            {
                "chunks": sum(counts),
                "chunks_per_second": round(sum(counts) / seconds),
                "tokens_per_second": round(streams * tokens / seconds),
                "tokens_per_chunk": round(streams * tokens / sum(counts), 2),
            }
        )
    return found


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve, run the clients as a process of their own, and put the numbers together."""
    engine = AsyncEngine("demo", max_num_seqs=arguments.streams, kv_cache_memory="1GiB")
    core = engine._worker.core
    core._executor = InstantModel(engine.tokenizer.vocab_size, arguments.step_ms / 1000)  # type: ignore[union-attr,assignment]
    settings = ServerSettings(model_names=("demo",))
    watch = Stopwatch(create_app(Service(engine, settings, PluginRegistry(entry_points=False))))
    watch.watch(engine)
    config = uvicorn.Config(
        watch, port=0, lifespan="off", ws="none", log_config=None, access_log=False,
        http=bounded_protocol(settings.max_header_bytes),
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    await run_clients(port, arguments, rounds=0)
    alone, watch.seconds = watch.seconds[5:], []
    cpu = time.process_time()
    rounds = await run_clients(port, arguments, rounds=arguments.rounds)
    cpu = time.process_time() - cpu
    server.should_exit = True
    await serving
    await engine.aclose()
    chunks = sum(entry["chunks"] for entry in rounds)
    return {
        "path": PATHS[arguments.chat],
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "step_ms": arguments.step_ms,
        "rounds": rounds,
        "median_chunks_per_second": statistics.median(entry["chunks_per_second"] for entry in rounds),
        "server_cpu_us_per_chunk": round(1e6 * cpu / chunks, 1),
        "ms_to_submit_alone": spread(alone),
        "ms_to_submit_all_at_once": spread(watch.seconds),
        "python": platform.python_version(),
        "uvicorn": uvicorn.__version__,
        "cores": os.cpu_count(),
    }


async def run_clients(port: int, arguments: argparse.Namespace, *, rounds: int) -> list[dict[str, float]]:
    """``clients`` in a process of its own."""
    command = [sys.executable, __file__, "--client", str(port), "--streams", str(arguments.streams)]
    command += ["--tokens", str(arguments.tokens), "--rounds", str(rounds)]
    command += ["--chat"] if arguments.chat else []
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await child.communicate()
    found: list[dict[str, float]] = json.loads(output)
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(1000 * cuts[49], 3), "p99": round(1000 * cuts[98], 3)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--output")
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        work = clients(
            arguments.client, arguments.streams, arguments.tokens, arguments.rounds, arguments.chat
        )
        print(json.dumps(asyncio.run(work)))
        return
    config = uvicorn.Config(lambda: None, log_config=None)
    loop = (config.get_loop_factory() or asyncio.new_event_loop)()
    text = json.dumps(loop.run_until_complete(measure(arguments)), indent=2)
    print(text)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
