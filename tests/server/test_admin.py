"""What only the server's owner may do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_model import KEY, MODEL, ServedModel, serving

from kvpage import ConfigError

PROMPT = "the block pool hands out blocks, and the prefix index finds them again"


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServedModel]:
    with serving(tiny, enable_admin=True, api_keys=(KEY,)) as running:
        yield running


def cached_tokens(server: ServedModel) -> int:
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=1).json()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_reset_forgets_cached_prefixes(server: ServedModel) -> None:
    cached_tokens(server)
    assert cached_tokens(server) > 0
    assert server.post("/reset_prefix_cache").status_code == 200
    assert cached_tokens(server) == 0


def test_a_reset_while_requests_run_is_refused(server: ServedModel) -> None:
    with server.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        status, _, message = server.refusal("/reset_prefix_cache")
    assert status == 409, message


def test_the_server_tells_what_it_runs_with_but_no_key(server: ServedModel) -> None:
    answer = server.http.get("/server_info")
    info = answer.json()
    assert info["server"]["model_names"] == [MODEL, "alias"]
    assert info["engine"]["max_model_len"] == 512
    assert info["engine"]["block_size"] == 16
    assert KEY not in answer.text


@pytest.mark.parametrize(
    "path", ["/sleep", "/wake_up", "/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
)
def test_what_is_not_there_yet_says_so(server: ServedModel, path: str) -> None:
    status, _, message = server.refusal(path)
    assert status == 501
    assert path in message


def test_admin_routes_need_the_key(server: ServedModel) -> None:
    for path in ("/reset_prefix_cache", "/sleep", "/collective_rpc"):
        assert server.http.post(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    assert server.http.get("/server_info", headers={"authorization": ""}).status_code == 401


def test_without_the_flag_there_are_no_admin_routes(tiny: Path) -> None:
    with serving(tiny, api_keys=(KEY,)) as server:
        for path in ("/reset_prefix_cache", "/sleep", "/wake_up", "/collective_rpc"):
            assert server.post(path).status_code == 404
        assert server.http.get("/server_info").status_code == 404
        assert server.post("/v1/load_lora_adapter").status_code == 501


def test_the_flag_without_a_key_is_no_way_to_start(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key"), serving(tiny, enable_admin=True):
        pass
