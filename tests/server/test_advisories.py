"""The classes of vLLM's published advisories; each test fails when the guard that it is about is taken out."""

from __future__ import annotations

import base64
import hmac
import json
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import HELLO, LiveServer, answered, live_server, refused

import kvpage_server.auth
from kvpage import AsyncEngine, CheckpointError
from kvpage.entrypoints.api_server import main
from kvpage_server.auth import Keys
from kvpage_server.errors import ApiError
from tiny_checkpoint import write_checkpoint

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def trusting(engine: AsyncEngine) -> Iterator[LiveServer]:
    """A server on which requests may bring templates of their own."""
    with live_server(engine, trust_request_chat_template=True) as server:
        yield server


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(a file that appears if the command is run, the command)."""
    mark = tmp_path / "it-ran"
    yield mark, f"touch {mark}"
    assert not mark.exists()


def test_unbounded_n(engine: AsyncEngine, server: LiveServer) -> None:
    for n in (16385, 10**9, 10**300):
        assert refused(server.post(COMPLETIONS, {"prompt": "a", "n": n}), 400)["param"] == "n"
        assert refused(server.post(CHAT, {**HELLO, "n": n}), 400)["param"] == "n"
    assert refused(server.post(COMPLETIONS, {"prompt": ["a"] * 17, "n": 1000}), 400)["param"] == "n"
    with live_server(engine, max_choices=4) as small:
        assert "at most 4" in refused(small.post(COMPLETIONS, {"prompt": "a", "n": 5}), 400)["message"]
        assert refused(small.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 3}), 400)["param"] == "n"
        assert len(small.complete(n=4, temperature=1, max_tokens=1)["choices"]) == 4


def test_unbounded_best_of(server: LiveServer) -> None:
    response = server.post(COMPLETIONS, {"prompt": "a", "best_of": 10**9, "max_tokens": 2})
    assert len(answered(response)["choices"]) == 1
    assert response.headers["x-kvpage-ignored-fields"] == "best_of"
    assert response.json()["usage"]["completion_tokens"] <= 2


def test_empty_prompt_crash(server: LiveServer) -> None:
    for prompt in ("", [], [[]], [""], ["a", ""], [[1], []]):
        refused(server.post(COMPLETIONS, {"prompt": prompt, "add_special_tokens": False}), 400)
        refused(server.post("/v1/embeddings", {"input": prompt, "add_special_tokens": False}), 400)
    for messages in ([], [{}]):
        refused(server.post(CHAT, {"messages": messages}), 400)
    server.service.engine.check_health()
    assert server.complete(max_tokens=1)["choices"]


def test_chat_template_abuse(server: LiveServer) -> None:
    template = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    for path, extra in ((CHAT, {}), ("/tokenize", {}), ("/v1/embeddings", {})):
        body = {**HELLO, "chat_template": template, **extra}
        assert refused(server.post(path, body), 400)["param"] == "chat_template"


def test_chat_template_loops_are_cut_short_even_where_templates_are_trusted(trusting: LiveServer) -> None:
    for template in (
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set s = namespace(t='a' * 1000) %}{% for i in range(99) %}{% set s.t = s.t + s.t %}{% endfor %}{{ s.t }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9 ** 99999999 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ):
        refused(trusting.post(CHAT, {**HELLO, "chat_template": template}), 400)


@pytest.mark.parametrize(
    "name",
    ["chat_template", "messages", "conversation", "tokenize", "tools", "documents", "continue_final_message"],
)
def test_chat_template_kwargs_abuse(server: LiveServer, name: str) -> None:
    for path in (CHAT, "/tokenize", "/v1/embeddings"):
        body = {**HELLO, "chat_template_kwargs": {name: "{{ 1 }}"}}
        assert refused(server.post(path, body), 400)["param"] == "chat_template_kwargs"


@pytest.mark.parametrize(
    "name", ["self", "engine", "template", "source", "variables", "__self", "__context", "range"]
)
def test_chat_template_kwargs_reach_nothing_but_the_template(server: LiveServer, name: str) -> None:
    response = server.post(CHAT, {**HELLO, "max_tokens": 1, "chat_template_kwargs": {name: {"a": 1}}})
    assert response.status_code in (200, 400), response.text


def test_api_key_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    stand_in = type("hmac", (), {"compare_digest": staticmethod(compare)})
    monkeypatch.setattr(kvpage_server.auth, "hmac", stand_in)
    keys = Keys(["first-key", "second", "x" * 500])
    for given, fits in (
        ("first-key", True),
        ("x" * 500, True),
        ("first-kez", False),
        ("f", False),
        ("", False),
    ):
        compared.clear()
        if fits:
            keys.check("/v1/models", "GET", f"Bearer {given}")
        else:
            with pytest.raises(ApiError) as caught:
                keys.check("/v1/models", "GET", f"Bearer {given}")
            assert caught.value.status == 401
        assert len(compared) == 3, "every key is compared, whichever fits"
        assert {len(side) for pair in compared for side in pair} == {32}, (
            "digests, whose length tells nothing"
        )


def test_oversized_headers(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n")
        sent = 0
        try:
            while sent < 64 * 2**20:
                connection.sendall(b"x-filler: " + b"a" * 4096 + b"\r\n")
                sent += 4108
        except OSError:
            pass
        assert sent < 8 * 2**20, "the server takes headers without end"
    refused(server.client.get("/health", headers={"x-filler": "a" * 66_000}), 431)


def test_oversized_trailers(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
        )
        connection.sendall(head)
        sent = 0
        try:
            while sent < 64 * 2**20:
                connection.sendall(b"x-filler: " + b"a" * 4096 + b"\r\n")
                sent += 4108
        except OSError:
            pass
        assert sent < 8 * 2**20, "the server takes trailers without end"


class Payload:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def test_prompt_embedding_deserialisation(server: LiveServer, bomb: tuple[Path, str]) -> None:
    embeds = base64.b64encode(pickle.dumps(Payload(bomb[1]))).decode()
    for fields in (
        {"prompt_embeds": embeds},
        {"prompt_embeds": [embeds]},
        {"prompt": {"prompt_embeds": embeds}},
    ):
        for path in (COMPLETIONS, CHAT):
            if path == COMPLETIONS or "prompt" not in fields:
                body = {"prompt": "a", **HELLO, **fields, "max_tokens": 1}
                assert refused(server.post(path, body), 400)["param"] in ("prompt_embeds", "prompt")
    part = {"type": "prompt_embeds", "prompt_embeds": embeds}
    refused(server.post(CHAT, {"messages": [{"role": "user", "content": [part]}]}), 400)


def test_prefix_cache_hash_collision(tiny: Path) -> None:
    first, second = (AsyncEngine(tiny, num_kv_blocks=16) for _ in range(2))
    try:
        names = [set(_cached_names(engine)) for engine in (first, second)]
    finally:
        first.close()
        second.close()
    assert len(names[0]) == len(names[1]) == 2
    assert not names[0] & names[1], "without a secret key, two prompts of one name could be searched for"
    assert {len(name) for name in names[0]} == {16}


def _cached_names(engine: AsyncEngine) -> list[bytes]:
    """What the prefix index of a fresh engine would call two blocks of the same tokens."""
    hasher = engine._worker.core.blocks._hasher
    digests: list[bytes] = []
    hasher.extend(hasher.root(None, None, 0, "full"), digests, list(range(64)), 2)
    return digests


def test_prefix_cache_of_another_tenant_is_not_told(server: LiveServer) -> None:
    body = {"prompt": [7] * 60, "max_tokens": 1}
    cached = [
        server.complete(**body, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("tenant-1", "tenant-1", "tenant-2")
    ]
    assert cached[1] > 0
    assert (cached[0], cached[2]) == (0, 0)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.popen(COMMAND).read()",
        "raise_exception.__globals__['__builtins__']['__import__']('os').system(COMMAND)",
        "(messages | map(attribute='__class__') | first).__init__.__globals__",
        "'{0.__class__.__init__.__globals__}'.format(strftime_now)",
        "('%c' * 9).__getattribute__('__class__')",
        "messages.append({}) or messages",
        "self.__init__.__globals__",
        "tools.__class__ if tools else self._TemplateReference__context.environment.globals.x.y",
    ],
)
def test_template_sandbox_escape(trusting: LiveServer, bomb: tuple[Path, str], expression: str) -> None:
    template = "{{ " + expression.replace("COMMAND", json.dumps(bomb[1])) + " }}!"
    body = {**HELLO, "chat_template": template, "max_tokens": 1, "return_prompt_text": True}
    response = trusting.post(CHAT, body)
    if response.status_code == 200:  # jinja2 may read what is unsafe as undefined, which is ""
        assert response.json()["prompt_text"] == "!"
    else:
        refused(response, 400)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_remote_code_from_auto_map(
    tmp_path: Path, bomb: tuple[Path, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    code = f"import os\nos.system({bomb[1]!r})\nclass Own: pass\n"
    if kind == "model":
        entries = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        write_checkpoint(folder, architectures=["OwnForCausalLM"], model_type="own", auto_map=entries)
    else:
        write_checkpoint(folder, tokenizer=False)
        settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(code)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        AsyncEngine(folder)
    assert main([str(folder), "--port", "0"]) != 0
    assert "trust" in capsys.readouterr().err


def test_remote_code_is_not_run_for_a_known_architecture_either(
    tmp_path: Path, bomb: tuple[Path, str]
) -> None:
    entries = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    folder = write_checkpoint(tmp_path / "checkpoint", auto_map=entries)
    (folder / "own.py").write_text(f"import os\nos.system({bomb[1]!r})\n")
    AsyncEngine(folder, num_kv_blocks=8).close()
