"""Clients that mean harm, against ``kvpage serve`` as a process: afterwards it answers, and holds nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import HELLO, LiveServer, answered, refused

from kvpage_server import http_protocol

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONTEXT = 512
MIB = 2**20


@dataclass(frozen=True)
class Victim:
    process: subprocess.Popen[str]
    port: int
    client: httpx.Client

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        kinds = {"content-type": "application/json", **headers}
        return self.client.post(path, content=content, headers=kinds)

    def blocks(self) -> dict[str, int]:
        """KV blocks by state, as /metrics has them."""
        text = self.client.get("/metrics").text
        found = re.findall(r'^kvpage:kv_blocks\{.*state="(\w+)".*\} (\S+)$', text, re.MULTILINE)
        return {state: int(float(value)) for state, value in found}

    def footprint(self) -> tuple[int, int, int]:
        """(threads, open files, MiB of memory)."""
        folder = Path("/proc") / str(self.process.pid)
        status = (folder / "status").read_text()
        memory = re.search(r"VmRSS:\s+(\d+)", status)
        assert memory is not None
        return len(os.listdir(folder / "task")), len(os.listdir(folder / "fd")), int(memory[1]) // 1024


@pytest.fixture(scope="module")
def process(tiny: Path) -> Iterator[Victim]:
    command = [sys.executable, "-m", "kvpage", "serve", str(tiny), "--port", "0", "--num-kv-blocks", "256"]
    command += ["--max-num-seqs", "16", "--disable-uvicorn-access-log", "--served-model-name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        try:
            assert started.stdout is not None
            line = next((line for line in started.stdout if line.startswith("kvpage serving")), "")
            url = line.split()[-1]
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                victim = Victim(started, int(url.rpartition(":")[2]), client)
                client.post(COMPLETIONS, json={"prompt": "a"})
                before = victim.footprint()
                yield victim
                after = victim.footprint()
                assert after[0] <= before[0] + 40, "threads"  # asyncio keeps a pool of them
                assert after[1] <= before[1] + 8, "open files"
                assert after[2] <= before[2] + 400, "memory"
        finally:
            started.kill()


@pytest.fixture
def victim(process: Victim) -> Iterator[Victim]:
    """The server, which must be as it was after the test: idle, every block free, and answering."""
    yield process
    deadline = time.monotonic() + 20
    while answered(process.client.get("/load")) != {"server_load": 0} or process.blocks()["used"]:
        assert time.monotonic() < deadline, (process.client.get("/load").text, process.blocks())
        time.sleep(0.02)
    assert process.blocks()["shared"] == 0
    assert answered(process.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}))["choices"]
    assert process.client.get("/health").status_code == 200


def request(body: bytes, *headers: bytes, length: bool = True) -> bytes:
    """Bytes of a POST /v1/completions."""
    lines = [b"POST /v1/completions HTTP/1.1", b"host: a", b"content-type: application/json", *headers]
    lines += [b"content-length: %d" % len(body)] if length else []
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def text_body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "The block", **fields}).encode()


LONG = {"max_tokens": 480, "ignore_eos": True}


def test_two_hundred_requests_that_are_cancelled(victim: Victim) -> None:
    def run(number: int) -> None:
        with victim.connect() as connection:
            connection.sendall(
                request(text_body(**LONG, stream=number % 2 == 0, n=1 + number % 3, temperature=1))
            )
            time.sleep(0.1 + 0.4 * (number % 5) / 4)

    for first in range(0, 200, 50):
        clients = [threading.Thread(target=run, args=(first + number,)) for number in range(50)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()


def test_readers_that_never_read(victim: Victim) -> None:
    connections = [victim.connect() for _ in range(8)]
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(text_body(**LONG, stream=True, logprobs=20, n=4, temperature=1)))
    assert answered(victim.client.post(COMPLETIONS, json={"prompt": "b", "max_tokens": 2}))["choices"]
    for connection in connections:
        connection.close()


def test_half_closed_sockets(victim: Victim) -> None:
    for number in range(20):
        connection = victim.connect()
        connection.sendall(request(text_body(**LONG, stream=number % 2 == 0)))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
        connection.close()


def test_requests_that_never_become_whole(victim: Victim) -> None:
    pieces = (b"", b"P", b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx", request(text_body(), length=True)[:-3],
              request(b"5\r\n{", b"transfer-encoding: chunked", length=False))  # fmt: skip
    connections = []
    for piece in pieces * 20:
        connections.append(victim.connect())
        connections[-1].sendall(piece)
    assert answered(victim.client.post(COMPLETIONS, json={"prompt": "b", "max_tokens": 2}))["choices"]
    for connection in connections:
        connection.close()


def test_more_connections_than_requests(victim: Victim) -> None:
    connections = [victim.connect() for _ in range(300)]
    assert answered(victim.client.post(COMPLETIONS, json={"prompt": "b", "max_tokens": 2}))["choices"]
    for connection in connections:
        connection.close()


NESTED = 900
DEEP = b'{"a":' * NESTED + b"1" + b"}" * NESTED


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (COMPLETIONS, b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"),
        (CHAT, b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":' + DEEP + b"}"),
        (CHAT, b'{"messages":[{"role":"user","content":"a"}],"tool_choice":"none","tools":[{"type":"function",'
               b'"function":{"name":"f","parameters":' + DEEP + b"}}]}"),
        (COMPLETIONS, b'{"prompt":"a","logit_bias":{"1":' + b"9" * 400 + b"}}"),
        (COMPLETIONS, b'{"prompt":"a","top_p":1' + b"0" * 400 + b"}"),
        (COMPLETIONS, b'{"prompt":"a","seed":-' + b"9" * 4000 + b"}"),
        (COMPLETIONS, b'{"prompt":"a","temperature":-Infinity}'),
        (COMPLETIONS, b'{"prompt":"a","logit_bias":{"1":1e999}}'),
        (COMPLETIONS, b'{"prompt":"a","prompt":"b"}'),
        (COMPLETIONS, b"{" + b",".join(b'"%d":1' % i for i in range(60_000)) + b',"59999":1}'),
        (COMPLETIONS, b'\xef\xbb\xbf{"prompt":"a"}'),
        (COMPLETIONS, '{"prompt":"a"}'.encode("utf-16")),
        (COMPLETIONS, b'{"prompt":"\xed\xa0\x80"}'),
        (COMPLETIONS, b'{"prompt":"\\ud800"}'),
        (COMPLETIONS, b'{"prompt":"a\\udfff","echo":true,"stream":true}'),
        (COMPLETIONS, b'{"prompt":"a","bad_words":["\\ud800"]}'),
        (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
        (COMPLETIONS, b'{"prompt":"a","model":"\\ud800"}'),
        (COMPLETIONS, b"\0" * 100),
        (COMPLETIONS, text_body(bad_words=[f"a{i}" for i in range(100_000)])),
        (COMPLETIONS, text_body(bad_words=["ab " * 10_000])),
        (COMPLETIONS, text_body(stop=["a" * MIB])),
        (COMPLETIONS, text_body(stop=["a"] * 100_000)),
        (COMPLETIONS, text_body(allowed_token_ids=[1] * 300_000)),
        (COMPLETIONS, text_body(stop_token_ids=[1] * 300_000)),
        (COMPLETIONS, text_body(logit_bias={str(i): 1 for i in range(300_000)})),
        (COMPLETIONS, text_body(logits_processors=["a"] * 1000)),
        (COMPLETIONS, text_body(n=16385)),
        (COMPLETIONS, text_body(logprobs=10**6)),
        (COMPLETIONS, text_body(prompt=["a"] * 1025)),
        (COMPLETIONS, text_body(prompt=[1] * 1_000_000)),
        (COMPLETIONS, text_body(prompt=[1] * CONTEXT)),
        (COMPLETIONS, text_body(prompt="a b " * 3_000_000)),
        (COMPLETIONS, text_body(prompt=" " * 10_000_000)),
        (CHAT, json.dumps({"messages": [{"role": "user", "content": "a" * 8_000_000}]}).encode()),
        ("/tokenize", text_body(prompt="!" * 15_000_000)),
        ("/v1/embeddings", json.dumps({"input": "a" * 15_000_000}).encode()),
        (COMPLETIONS, text_body(prompt="")),
        (CHAT, b'{"messages":[]}'),
    ],
    ids=range(39),
)  # fmt: skip
def test_bodies_that_are_refused(victim: Victim, path: str, content: bytes) -> None:
    response = victim.post(path, content)
    refused(response, 404 if b'"model":"\\ud800"' in content else 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "\0" * 50, "echo": True},
        {"prompt": "\u202e\uffff\u200d" * 20, "echo": True, "logprobs": 3},
        {"prompt": [5] * (CONTEXT - 1)},
        {"prompt": "a", "top_k": 10**30},
        {"prompt": "a", "temperature": 5e-324, "top_p": 5e-324},
        {"prompt": "a", "repetition_penalty": 1e300},
        {"prompt": "a", "stop": ["\ud800"]},
        {"prompt": "a", "user": "\ud83d\ude00", "\0": 1},
        {"prompt": "a", "logit_bias": {str(i): -100 for i in range(300)}},
        {"prompt": ["a"] * 1024, "max_tokens": 1},
        {"prompt": "a", "n": 500, "temperature": 1, "max_tokens": 1},
        {"prompt": "a", "k" * MIB: 1},
        {"prompt": "a", **{str(i): 1 for i in range(50_000)}},
        {"prompt": "a", "stop": ["(a+)+$", "(" * 4000]},
    ],
    ids=range(14),
)
def test_bodies_that_are_odd_and_answered(victim: Victim, fields: dict[str, Any]) -> None:
    answered(victim.post(COMPLETIONS, json.dumps({"max_tokens": 3, **fields}).encode()))


def test_arguments_of_calls_that_are_nested_too_deeply_stay_text(victim: Victim) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    messages = [
        *HELLO["messages"],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *HELLO["messages"],
    ]
    answered(victim.client.post(CHAT, json={"messages": messages, "max_tokens": 1}))


def test_others_are_answered_while_a_huge_text_is_looked_at(victim: Victim) -> None:
    huge = text_body(prompt=" " * 15_000_000)
    sender = threading.Thread(target=victim.post, args=(COMPLETIONS, huge))
    sender.start()
    with httpx.Client(base_url=victim.client.base_url, timeout=5, trust_env=False) as other:
        while sender.is_alive():
            assert other.get("/health").status_code == 200
    sender.join()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(text_body(), length=False), 400),
        (request(b"zz\r\n{}", b"transfer-encoding: chunked", length=False), 400),
        (request(text_body(), b"content-length: 3"), 400),
        (request(text_body(), b"transfer-encoding: chunked"), 400),
        (request(b"", b"content-length: -1", length=False), 400),
        (request(b"", b"content-length: " + b"9" * 30, length=False), 400),
        (request(b"", b"content-length: 4611686018427387904", length=False), 413),
        (request(text_body(), b"x: " + b"a" * 70_000), 431),
        (request(text_body(), *[b"x-%d: " % i + b"a" * 90 for i in range(1000)]), 431),
        (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", 400),
        (b"GET /health HTTP/3.3\r\nhost: a\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"TRACE /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 405),
        (b"GET http://elsewhere/v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 200),
        (b"GET /health/../v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
        (b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", 200),
    ],
    ids=range(21),
)
def test_what_is_hardly_http(victim: Victim, data: bytes, status: int) -> None:
    with victim.connect() as connection:
        connection.sendall(data)
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_over_the_limit_without_a_length(victim: Victim) -> None:
    with victim.connect() as connection:
        connection.sendall(request(b"", b"transfer-encoding: chunked", length=False))
        sent = 0
        try:
            while sent < 64 * MIB:
                connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                sent += 65536
        except OSError:
            pass
        assert sent < 32 * MIB


def test_a_thousand_requests_in_one_go(victim: Victim) -> None:
    one = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    received = b""
    with victim.connect() as connection:
        connection.sendall(one * 999 + request(text_body(max_tokens=1)) + last)
        while piece := connection.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200 OK") == 1001


@pytest.mark.parametrize(("sent", "part"), [(b"POST /v1", "HEADER"), (request(text_body())[:-3], "BODY")])
def test_a_slow_sender_is_told_that_its_time_is_over(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, sent: bytes, part: str
) -> None:
    monkeypatch.setattr(http_protocol, f"{part}_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(sent)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == 408
