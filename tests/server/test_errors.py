"""Whatever is wrong is answered with OpenAI's error object, and the next request is served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from live_server import LiveServer, answered, live_server, refused

from kvpage import AsyncEngine
from kvpage_server.service import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def raw_post(server: LiveServer, content: bytes, kind: str = "application/json") -> Any:
    return server.client.post(COMPLETIONS, content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        ({"model": "gpt-4"}, 404, "model", "The model `gpt-4` does not exist"),
        ({"max_tokens": -1}, 400, "max_tokens", "(parameter=max_tokens, value=-1)"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": 513}, 400, "max_tokens", "cannot be greater than max_model_len=512"),
        ({"n": 0}, 400, "n", "value=0"),
        ({"n": 16385}, 400, "n", "16384"),
        ({"n": 2, "temperature": 0}, 400, "n", "temperature"),
        ({"temperature": 3}, 400, "temperature", "at most 2"),
        ({"temperature": -0.1}, 400, "temperature", "value=-0.1"),
        ({"top_p": 0}, 400, "top_p", "above 0"),
        ({"top_k": -2}, 400, "top_k", "value=-2"),
        ({"min_p": 1.5}, 400, "min_p", "at most 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty", "above 0"),
        ({"presence_penalty": 3}, 400, "presence_penalty", "at most 2"),
        ({"min_tokens": 9, "max_tokens": 3}, 400, "min_tokens", "max_tokens=3"),
        ({"seed": 2**63}, 400, "seed", "between"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "non-empty"),
        ({"logprobs": 21}, 400, "logprobs", "max_logprobs=20"),
        ({"logprobs": -2}, 400, "logprobs", "value=-2"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "stream"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias", "out of vocabulary"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids", "empty"),
        ({"prompt": ""}, 400, "prompt", "empty"),
        ({"prompt": []}, 400, "prompt", "empty"),
        ({"prompt": [[]]}, 400, "prompt", "empty"),
        ({"prompt": None}, 400, "prompt", "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt"),
        ({"prompt": [999999]}, 400, "prompt", "out of vocabulary"),
        ({"prompt": [-1]}, 400, "prompt", "out of vocabulary"),
        ({"prompt": "\ud800"}, 400, "prompt", "surrogate"),
        ({"prompt": ["a"] * 1025}, 400, "prompt", "1024"),
        ({"prompt": [40] * 512}, 400, "input_tokens", "maximum context length is 512 tokens"),
        ({"suffix": "x"}, 400, "suffix", "fill in the middle"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "structured output"),
        ({"structured_outputs": {"json": {}}}, 400, "structured_outputs", "structured output"),
        ({"guided_json": {}}, 400, "guided_json", "structured output"),
        ({"prompt_embeds": "gASVAAAA"}, 400, "prompt_embeds", "text or token ids"),
        ({"cache_salt": "a/b"}, 400, "cache_salt", "@, /"),
        ({"cache_salt": ""}, 400, "cache_salt", "1 to 128"),
        ({"priority": 1}, 400, "priority", "--scheduling-policy"),
        ({"truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens", "at least 1"),
        ({"logits_processors": ["none"]}, 400, "logits_processors", "not registered"),
        ({"use_beam_search": True}, 400, "use_beam_search", "beam search"),
        ({"kv_transfer_params": {"a": 1}}, 400, "kv_transfer_params", "KV connectors"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(
    server: LiveServer, body: dict[str, Any], status: int, param: str, text: str
) -> None:
    content = json.dumps({"prompt": "The block", **body}).encode()
    error = refused(raw_post(server, content), status)
    assert error["param"] == param
    assert text in error["message"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a\x00b"}', "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"prompt": "a", "n": ' + b"9" * 500 + b"}", "n"),
        (b'{"prompt": "a", "n": 1, "n": 2}', "twice"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 100"),
        (b'{"prompt": "a", "max_tokens": "5"}', "body.max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "body.max_tokens"),
        (b'{"prompt": "a", "stream": 1}', "body.stream"),
        (b'{"prompt": "a", "stop": [1, 2]}', "body.stop"),
        (b'{"prompt": "a", "user": ' + b"[" * 90 + b"]" * 90 + b"}", "body.user"),
    ],
)
def test_a_body_that_is_not_what_it_should_be_is_a_400(server: LiveServer, content: bytes, text: str) -> None:
    assert text in refused(raw_post(server, content), 400)["message"]


def test_one_wrong_field_is_named_and_shown_in_short(server: LiveServer) -> None:
    error = refused(server.post(CHAT, {"messages": "x" * 10_000}), 400)
    assert error["param"] == "body.messages"
    assert error["type"] == "Bad Request"
    assert error["message"].startswith("1 validation error(s): body.messages")
    assert len(error["message"]) < 400


def test_many_wrong_fields_are_counted_and_ten_of_them_told(server: LiveServer) -> None:
    names = (
        "n",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
        "echo",
        "stream",
        "min_tokens",
        "bad_words",
        "user",
    )
    wrong: dict[str, Any] = {name: {} for name in names}
    error = refused(server.post(COMPLETIONS, {"prompt": "a", **wrong}), 400)
    assert error["message"].count("body.") == 10
    assert "more" in error["message"]


def test_a_body_of_another_kind_is_refused(server: LiveServer) -> None:
    content = b'{"prompt": "a", "max_tokens": 1}'
    refused(raw_post(server, content, "text/plain"), 400)
    refused(raw_post(server, content, "application/x-www-form-urlencoded"), 400)
    assert raw_post(server, content, "application/json; charset=utf-8").status_code == 200


def test_a_million_wrong_entries_are_one_error(server: LiveServer) -> None:
    error = refused(server.post(COMPLETIONS, {"prompt": "a", "stop_token_ids": ["a"] * 1_000_000}), 400)
    assert error["message"].startswith("1 validation")


def test_unknown_routes_and_methods_are_told_in_the_same_form(server: LiveServer) -> None:
    assert refused(server.client.get("/v1/nothing"), 404)["type"] == "Not Found"
    assert refused(server.client.get("/v1/models/nobody"), 404)["param"] == "model"
    wrong_method = server.client.get(COMPLETIONS)
    refused(wrong_method, 405)
    assert wrong_method.headers["allow"] == "POST"


def test_a_server_error_tells_nothing_but_the_request_s_id(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def model_name(self: Service, asked: str | None) -> str:
        raise RuntimeError("/etc/secret at 0x7f00")

    monkeypatch.setattr(Service, "model_name", model_name)
    with caplog.at_level("ERROR", logger="kvpage.server"):
        response = server.post(COMPLETIONS, {"prompt": "a"}, headers={"x-request-id": "who-7"})
    error = refused(response, 500)
    assert "who-7" in error["message"]
    assert "secret" not in response.text
    assert "secret" in caplog.text


@pytest.fixture(scope="module")
def guarded(engine: AsyncEngine) -> Iterator[LiveServer]:
    with live_server(
        engine, api_keys=("first", "sécond"), max_body_bytes=1000, max_header_bytes=4096
    ) as server:
        yield server


@pytest.mark.parametrize(
    "header",
    [None, "", "first", "Basic first", "Bearer", "Bearer firs", "Bearer firstx", "Bearer first second",
     "Bearer \xff"],
)  # fmt: skip
@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/tokenize", "/docs", "/v1/nothing", "/health/", "/health%2f../v1/models", "/HEALTH"],
)
def test_without_a_key_nothing_is_answered(guarded: LiveServer, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = guarded.client.get(path, headers=headers)
    assert refused(response, 401)["type"] == "AuthenticationError"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "BEARER  first"])
def test_every_key_opens_whatever_the_scheme_s_case(guarded: LiveServer, header: str) -> None:
    answered(guarded.client.get("/v1/models", headers={"Authorization": header}))
    second = {"Authorization": "Bearer sécond".encode()}
    answered(guarded.client.get("/v1/models", headers=second))


@pytest.mark.parametrize("path", ["/health", "/ping", "/version"])
def test_probes_need_no_key(guarded: LiveServer, path: str) -> None:
    assert guarded.client.get(path).status_code == 200


def test_a_body_that_is_too_large_is_refused_whatever_length_it_claims(guarded: LiveServer) -> None:
    headers = {**JSON, "Authorization": "Bearer first"}
    large = b'{"prompt": "' + b"a" * 2000 + b'"}'
    refused(guarded.client.post(COMPLETIONS, content=large, headers=headers), 413)
    chunked = guarded.client.post(COMPLETIONS, content=iter([large[:900], large[900:]]), headers=headers)
    refused(chunked, 413)


def test_headers_that_are_too_large_are_refused(guarded: LiveServer) -> None:
    refused(guarded.client.get("/health", headers={"x-large": "a" * 5000}), 431)
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n")
        received = b""
        with suppress(OSError):  # closed in the middle, as it should be
            for _ in range(100):
                connection.sendall(b"x-more: " + b"a" * 1000 + b"\r\n")
        with suppress(OSError):
            received = connection.recv(4096)
    assert not received or b" 431 " in received
    assert guarded.client.get("/health").status_code == 200


def test_what_is_no_http_gets_an_error_object(server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        received = connection.makefile("rb").read()
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert json.loads(body)["error"]["code"] == 400


def test_a_full_queue_is_told_to_come_again(tiny: Any) -> None:
    engine = AsyncEngine(tiny, max_num_seqs=1, max_num_queued_reqs=1, num_kv_blocks=64)
    try:
        for status, settings in ((503, {}), (429, {"overload_status": 429})):
            with live_server(engine, **settings) as server:
                body = {"prompt": ["a"] * 8, "max_tokens": 50, "ignore_eos": True}
                response = server.post(COMPLETIONS, body)
                assert "max_num_queued_reqs" in refused(response, status)["message"]
                assert response.headers["retry-after"] == "1"
                server.wait_until_idle()
    finally:
        engine.close()


def test_what_can_never_fit_in_the_pool_is_refused_with_both_numbers(tiny: Any) -> None:
    engine = AsyncEngine(tiny, num_kv_blocks=4, block_size=16)
    try:
        with live_server(engine) as server:
            error = refused(server.post(COMPLETIONS, {"prompt": [40] * 100}), 400)
            assert "64 tokens" in error["message"]
            assert "100 prompt tokens" in error["message"]
            assert server.complete(max_tokens=1)["choices"]
    finally:
        engine.close()


def test_cors_is_off_unless_origins_are_named(server: LiveServer, engine: AsyncEngine) -> None:
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.client.get("/v1/models", headers=asking).headers
    with live_server(engine, allowed_origins=("https://a.example",), api_keys=("k",)) as open_server:
        preflight = open_server.client.options(COMPLETIONS, headers=asking)
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        told = open_server.client.get("/v1/models", headers=asking)
        assert told.status_code == 401
        assert told.headers["access-control-allow-origin"] == "https://a.example"


def test_a_server_behind_a_prefix_guards_the_same_routes(engine: AsyncEngine) -> None:
    with live_server(engine, root_path="/llm", api_keys=("k",)) as server:
        assert server.client.get("/health").status_code == 200
        refused(server.client.get("/v1/models"), 401)
        answered(server.client.get("/v1/models", headers={"Authorization": "Bearer k"}))


def test_the_openapi_document_describes_bodies_and_refers_to_nothing_that_is_missing(
    server: LiveServer,
) -> None:
    document = server.client.get("/openapi.json").json()
    content = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in content["required"]
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in schemas
