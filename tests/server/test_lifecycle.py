"""Clients that go away, signals, and the death of the engine: nothing is left behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import HELLO, LiveServer, answered, live_server, refused

from kvpage import AsyncEngine, KvpageError
from kvpage.entrypoints.openai.api_server import main
from kvpage_server.serve import bind
from kvpage_server.server_flags import listening_of, make_parser

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "The block", "max_tokens": 480, "ignore_eos": True}
DYING = """
import sys
from kvpage.cli.main import main
from kvpage.engine.core import EngineCore
step = EngineCore.step
def failing(self):
    if self.totals.steps >= 3:
        self.scheduler = None
    return step(self)
EngineCore.step = failing
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def send_half(server: LiveServer, body: bytes, path: str = COMPLETIONS) -> socket.socket:
    """A connection with a request on it whose answer nobody has read yet."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def raw_body(**fields: Any) -> bytes:
    return httpx.Request("POST", "http://a", json={**LONG, **fields}).content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: LiveServer, stream: bool) -> None:
    connection = send_half(server, raw_body(stream=stream, n=4, temperature=1))
    while not server.service.engine.stats().used_blocks:
        time.sleep(0.001)
    assert answered(server.client.get("/load")) == {"server_load": 1}
    connection.close()
    server.wait_until_idle()


def test_two_hundred_clients_that_leave_do_not_keep_the_next_one_from_an_answer(server: LiveServer) -> None:
    for index in range(200):
        connection = send_half(server, raw_body(stream=index % 2 == 0))
        if index % 3 == 0:
            connection.shutdown(socket.SHUT_WR)  # half-closed
        if index % 10 == 0:
            connection.recv(100)
        connection.close()
    assert server.complete(max_tokens=2)["choices"]
    server.wait_until_idle()


def test_a_client_that_leaves_before_its_request_is_whole_holds_nothing(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = raw_body()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9999\r\n\r\n" + body)
    while not server.service.load:
        time.sleep(0.001)
    connection.close()
    server.wait_until_idle()
    assert caplog.records == []  # that is nobody's fault


def test_a_slow_reader_holds_no_more_than_its_answer(server: LiveServer) -> None:
    connection = send_half(server, raw_body(stream=True, n=8, temperature=1, logprobs=20))
    answer = server.complete(max_tokens=5)  # others go on meanwhile
    assert answer["choices"]
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += connection.recv(2**20)
    assert received.count(b'"finish_reason":"length"') == 8
    connection.close()


def test_a_failing_step_ends_every_open_request_with_a_500(tiny: Path) -> None:
    engine = AsyncEngine(tiny, num_kv_blocks=64)
    try:
        with live_server(engine) as server:
            scheduler = engine._worker.core.scheduler
            with server.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
                assert response.status_code == 200
                events = response.iter_lines()
                next(events)
                engine._worker.call(lambda core: setattr(scheduler, "schedule", None))
                rest = list(events)
            assert '"code": 500' in rest[-4]
            assert rest[-2] == "data: [DONE]"
            assert refused(server.post(COMPLETIONS, LONG), 500)["type"] == "EngineDeadError"
            assert server.client.get("/health").status_code == 503
            assert answered(server.client.get("/load")) == {"server_load": 0}
    finally:
        engine.close()


@contextmanager
def serving(
    model: Path, *flags: str, program: tuple[str, ...] = ("-m", "kvpage", "serve")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``kvpage serve`` as a process of its own; the process and its url."""
    command = [sys.executable, *program, str(model), "--port", "0", "--num-kv-blocks", "64", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("kvpage serving")), "")
            assert line, process.stderr.read() if process.stderr else ""
            yield process, line.split()[-1]
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and standard error."""
    _, errors = process.communicate(timeout=10)
    return process.returncode, errors


def test_sigint_lets_open_requests_end_within_the_timeout_and_refuses_new_ones(tiny: Path) -> None:
    with serving(tiny, "--shutdown-timeout", "20") as (process, url), httpx.Client(trust_env=False) as client:
        body = {**LONG, "max_tokens": 240, "n": 8, "temperature": 1, "stream": True}
        with client.stream("POST", url + COMPLETIONS, json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            while (health := httpx.get(f"{url}/health", trust_env=False)).status_code == 200:
                time.sleep(0.005)
            assert health.status_code == 503
            late = httpx.post(url + CHAT, json=HELLO, trust_env=False)
            assert refused(late, 503)["message"]
            assert late.headers["retry-after"] == "1"
            rest = list(lines)
        assert sum('"finish_reason":"length"' in line for line in rest) == 8
        assert rest[-2] == "data: [DONE]"
        assert ended(process)[0] == 0
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", int(url.rpartition(":")[2])))


def test_without_a_timeout_open_requests_are_cut_off_and_told_so(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(tiny, "--uds", str(path)) as (process, _):
        transport = httpx.HTTPTransport(uds=str(path))
        body = {**LONG, "n": 60, "temperature": 1, "stream": True}
        with (
            httpx.Client(transport=transport, base_url="http://server") as client,
            client.stream("POST", COMPLETIONS, json=body, timeout=30) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert '"code": 503' in rest[-4]
        status, errors = ended(process)
        assert status == 0
        assert "Traceback" not in errors
    assert not path.exists()


def test_the_death_of_the_engine_ends_the_process(tiny: Path) -> None:
    with serving(tiny, program=("-c", DYING)) as (process, url):
        response = httpx.post(url + COMPLETIONS, json=LONG, trust_env=False, timeout=30)
        assert refused(response, 500)["type"] == "EngineDeadError"
        status, errors = ended(process)
        assert status == 1
        assert "the engine died" in errors


def test_a_server_may_outlive_its_engine(tiny: Path) -> None:
    with serving(tiny, "--keep-alive-on-engine-death", program=("-c", DYING)) as (process, url):
        for _ in range(2):
            refused(httpx.post(url + COMPLETIONS, json=LONG, trust_env=False, timeout=30), 500)
        time.sleep(0.5)
        assert process.poll() is None
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 503
        process.send_signal(signal.SIGTERM)
        ended(process)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["--model", "nowhere", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_unix_socket_that_nobody_answers_is_taken_over_and_another_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listening = listening_of(make_parser().parse_arguments(["--uds", path]), {})
    bind(listening).close()
    with bind(listening) as listener:
        listener.listen()
        with pytest.raises(KvpageError, match="another server answers there"):
            bind(listening)
