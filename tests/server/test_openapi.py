"""What the OpenAPI document promises is what the server answers, whatever is sent to it."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
from live_server import LiveServer, answered, refused

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks as documented  # noqa: E402

KINDS = {"400", "401", "404", "413", "500", "501", "503"}
OPEN = {"/health", "/ping", "/version", "/metrics"}
CHECKS = (
    schemathesis.checks.not_a_server_error,
    documented.status_code_conformance,
    documented.content_type_conformance,
    documented.response_schema_conformance,
)
MOST_TOKENS = 24


@pytest.fixture(scope="module")
def document(shared_server: LiveServer) -> dict[str, Any]:
    return answered(shared_server.client.get("/openapi.json"))


def test_every_guarded_route_declares_the_error_object(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if path in OPEN:
                continue
            assert set(operation["responses"]) >= KINDS, path
            for status in KINDS:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_every_reference_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    used = {piece.split('"')[0] for piece in text.split("#/components/schemas/")[1:]}
    assert used <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in text


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_within_or_against_the_document_is_a_server_error(
    server: LiveServer, document: dict[str, Any], mode: Any
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    kinds: set[int] = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # what takes nothing cannot be called wrongly
        cases = operation.as_strategy(generation_mode=mode)

        @settings(
            max_examples=12, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases)
        def answers(case: Any) -> None:
            if isinstance(case.body, dict) and not isinstance(
                case.body.get("max_tokens", ""), (str, dict, list)
            ):
                case.body["max_tokens"] = min(case.body["max_tokens"] or MOST_TOKENS, MOST_TOKENS)
            response = case.call(base_url=server.url, timeout=30)
            kinds.add(response.status_code)
            case.validate_response(response, checks=list(CHECKS))

        answers()
    assert kinds & {200, 400}


def test_unknown_methods_and_paths_get_the_error_object(server: LiveServer) -> None:
    for method, path, status in (
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("GET", "/nowhere", 404),
    ):
        refused(server.client.request(method, path), status)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("HEAD", "/v1/completions")
    assert connection.getresponse().status == 405
    connection.close()
