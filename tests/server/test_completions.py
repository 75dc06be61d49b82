"""POST /v1/completions, whole answers: every field does what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
from live_server import MODEL, LiveServer, answered, refused

TOKENS = [1, 40, 41, 42]


def choice(server: LiveServer, **body: Any) -> dict[str, Any]:
    (only,) = server.complete(**body)["choices"]
    found: dict[str, Any] = only
    return found


def test_an_answer_has_the_form_that_clients_read(server: LiveServer) -> None:
    answer = server.complete(max_tokens=5, ignore_eos=True)
    assert set(answer) == {
        "id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier",
    }  # fmt: skip
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("cmpl-")
    assert answer["system_fingerprint"].startswith("kvpage-")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["stop_reason"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


def test_sixteen_tokens_are_generated_unless_the_request_says_otherwise(server: LiveServer) -> None:
    assert server.complete(ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert server.complete(ignore_eos=True, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_every_optional_field_may_be_null(server: LiveServer) -> None:
    names = (
        "model", "max_tokens", "n", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "seed",
        "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "echo", "stream", "stream_options",
        "use_beam_search", "length_penalty", "skip_special_tokens", "spaces_between_special_tokens",
        "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "response_format", "structured_outputs",
        "priority", "request_id", "session_id", "cache_salt", "vllm_xargs", "kv_transfer_params", "return_token_ids",
        "return_tokens_as_token_ids", "stream_interval", "thinking_token_budget", "prompt_embeds", "logprob_token_ids",
        "user", "suffix", "logprobs", "best_of", "timeout",
    )  # fmt: skip
    response = server.post("/v1/completions", {"prompt": "The block", **dict.fromkeys(names)})
    answered(response)


def test_choices_of_several_prompts_stand_in_the_order_of_the_prompts(server: LiveServer) -> None:
    alone = [choice(server, prompt=text, max_tokens=4)["text"] for text in ("The block", "Every request")]
    answer = server.complete(
        prompt=["The block", "Every request"], n=2, max_tokens=4, temperature=0.001, seed=1
    )
    assert [entry["index"] for entry in answer["choices"]] == [0, 1, 2, 3]
    greedy = server.complete(prompt=["The block", "Every request"], max_tokens=4)
    assert [entry["text"] for entry in greedy["choices"]] == alone
    prompt_tokens = greedy["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == prompt_tokens  # once a prompt, whatever n is


def test_prompts_may_be_token_ids(server: LiveServer) -> None:
    ids = server.service.engine.tokenizer.encode("The block")  # type: ignore[union-attr]
    text = choice(server, prompt="The block", max_tokens=6)["text"]
    assert choice(server, prompt=ids, max_tokens=6)["text"] == text
    batch = server.complete(prompt=[ids, TOKENS], max_tokens=6)
    assert batch["choices"][0]["text"] == text
    assert batch["usage"]["prompt_tokens"] == len(ids) + len(TOKENS)


def test_a_seed_makes_an_answer_repeatable_and_another_one_differs(server: LiveServer) -> None:
    def text(seed: int) -> str:
        return str(choice(server, temperature=1.5, seed=seed, max_tokens=12, ignore_eos=True)["text"])

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1
    assert text(-5) == text(-5)


def test_a_stop_string_ends_the_answer_and_is_named(server: LiveServer) -> None:
    whole = choice(server, max_tokens=20, ignore_eos=True)["text"]
    stop = whole[3:6]
    cut = choice(server, max_tokens=20, ignore_eos=True, stop=[stop])
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["text"] == whole[: whole.index(stop)]
    kept = choice(server, max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept["text"] == whole[: whole.index(stop) + len(stop)]


def test_a_stop_token_ends_the_answer_and_is_named(server: LiveServer) -> None:
    token = choice(server, max_tokens=3, ignore_eos=True, return_token_ids=True)["token_ids"][2]
    cut = choice(server, max_tokens=20, ignore_eos=True, stop_token_ids=[token])
    assert cut["finish_reason"] == "stop"
    assert cut["stop_reason"] == token


def test_logit_bias_decides_what_is_chosen(server: LiveServer) -> None:
    forced = choice(server, max_tokens=3, logit_bias={"50": 100}, return_token_ids=True)
    assert forced["token_ids"] == [50, 50, 50]
    allowed = choice(server, max_tokens=3, allowed_token_ids=[51], return_token_ids=True)
    assert allowed["token_ids"] == [51, 51, 51]


def test_echo_puts_the_prompt_before_the_answer(server: LiveServer) -> None:
    plain = choice(server, max_tokens=4)["text"]
    assert choice(server, max_tokens=4, echo=True)["text"] == "The block" + plain


def test_echo_with_no_tokens_at_all_gives_the_prompt_back(server: LiveServer) -> None:
    answer = server.complete(max_tokens=0, echo=True, logprobs=1)
    (only,) = answer["choices"]
    assert only["text"] == "The block"
    assert only["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(only["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


def test_logprobs_hold_one_entry_a_token_and_the_chosen_one_among_the_top(server: LiveServer) -> None:
    logprobs = choice(server, max_tokens=5, logprobs=3, ignore_eos=True)["logprobs"]
    assert [len(entries) for entries in logprobs.values()] == [5, 5, 5, 5]
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == value == max(top.values())  # greedy
        assert 1 <= len(top) <= 4
        assert -math.inf < value <= 0
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(5)]


def test_with_echo_the_prompt_s_tokens_have_logprobs_but_the_first(server: LiveServer) -> None:
    # lm-eval scores texts this way.
    only = choice(server, prompt=TOKENS, max_tokens=1, logprobs=1, echo=True)
    logprobs = only["logprobs"]
    assert len(logprobs["tokens"]) == len(TOKENS) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value is not None for value in logprobs["token_logprobs"][1:])


def test_tokens_may_be_named_by_their_ids(server: LiveServer) -> None:
    only = choice(
        server,
        max_tokens=2,
        logprobs=0,
        return_tokens_as_token_ids=True,
        return_token_ids=True,
        prompt=TOKENS,
    )
    assert only["logprobs"]["tokens"] == [f"token_id:{token}" for token in only["token_ids"]]
    assert only["prompt_token_ids"] == TOKENS


def test_prompt_logprobs_are_reported_by_token_id(server: LiveServer) -> None:
    positions = choice(server, prompt=TOKENS, max_tokens=1, prompt_logprobs=2)["prompt_logprobs"]
    assert positions[0] is None
    for token, position in zip(TOKENS[1:], positions[1:], strict=True):
        assert set(position[str(token)]) == {"logprob", "rank", "decoded_token"}


def test_a_prompt_may_be_cut_to_its_last_or_first_tokens(server: LiveServer) -> None:
    last = choice(server, prompt=TOKENS, truncate_prompt_tokens=2, return_token_ids=True, max_tokens=1)
    assert last["prompt_token_ids"] == TOKENS[-2:]
    first = choice(
        server,
        prompt=TOKENS,
        truncate_prompt_tokens=2,
        truncation_side="right",
        return_token_ids=True,
        max_tokens=1,
    )
    assert first["prompt_token_ids"] == TOKENS[:2]
    fitted = choice(
        server, prompt=[40] * 900, truncate_prompt_tokens=-1, return_token_ids=True, max_tokens=10
    )
    assert len(fitted["prompt_token_ids"]) == 502


def test_more_tokens_than_the_context_holds_are_clamped_and_a_header_says_so(server: LiveServer) -> None:
    body = {"prompt": [40] * 500, "max_tokens": 100, "ignore_eos": True}
    response = server.post("/v1/completions", body)
    assert answered(response)["usage"]["completion_tokens"] == 12
    assert response.headers["x-kvpage-max-tokens-clamped"] == "12"


def test_a_repeated_prompt_is_read_from_the_cache_unless_salted(server: LiveServer) -> None:
    prompt = list(range(20, 100))

    def cached(**body: Any) -> int:
        usage = server.complete(prompt=prompt, max_tokens=1, **body)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert cached(cache_salt="tenant-1") == 0
    assert cached(cache_salt="tenant-1") > 0


def test_fields_without_effect_are_named_in_a_header(server: LiveServer) -> None:
    body = {"prompt": "a", "max_tokens": 1, "user": "me", "best_of": 3, "made\r\nup": 1}
    response = server.post("/v1/completions", body)
    assert response.headers["x-kvpage-ignored-fields"] == "user,best_of,madeup"
    streamed = {
        "prompt": "a",
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    }
    response = server.post("/v1/completions", streamed)
    assert response.headers["x-kvpage-ignored-fields"] == "stream_options.include_obfuscation"
    assert "x-kvpage-ignored-fields" not in server.post("/v1/completions", {"prompt": "a"}).headers


def test_a_request_id_comes_back_in_header_and_answer(server: LiveServer) -> None:
    response = server.post(
        "/v1/completions", {"prompt": "a", "request_id": "body-7"}, headers={"X-Request-Id": "mine-7"}
    )
    assert response.headers["x-request-id"] == "mine-7"
    assert response.json()["id"] == "cmpl-mine-7"
    assert server.complete(request_id="body-7")["id"] == "cmpl-body-7"
    spoilt = server.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "no spaces"})
    assert spoilt.headers["x-request-id"] != "no spaces"


def test_the_models_are_listed_with_their_context(server: LiveServer) -> None:
    models = answered(server.client.get("/v1/models"))["data"]
    assert [model["id"] for model in models] == [MODEL, "alias"]
    assert models[0]["max_model_len"] == 512
    assert answered(server.client.get(f"/v1/models/{MODEL}"))["id"] == MODEL
    assert server.complete(model="alias")["model"] == "alias"
    assert server.complete(model="")["model"] == MODEL


@pytest.mark.parametrize(("path", "key"), [("/version", "version"), ("/load", "server_load")])
def test_small_endpoints_answer(server: LiveServer, path: str, key: str) -> None:
    assert key in answered(server.client.get(path))


def test_health_has_no_body(server: LiveServer) -> None:
    for response in (server.client.get("/health"), server.client.get("/ping"), server.client.post("/ping")):
        assert (response.status_code, response.content) == (200, b"")


def test_offsets_of_an_echoed_prompt_point_into_the_text(server: LiveServer) -> None:
    found = choice(server, max_tokens=4, echo=True, logprobs=1, ignore_eos=True)
    tokens, offsets = found["logprobs"]["tokens"], found["logprobs"]["text_offset"]
    assert offsets[0] == 0
    assert tokens[0] not in found["text"], (
        "the prompt begins with a special token, which is no part of the text"
    )
    pairs = zip(tokens[1:], offsets[1:], strict=True)
    assert [found["text"][at : at + len(token)] for token, at in pairs] == tokens[1:]


@pytest.mark.parametrize("token", [-1, -2032080248, 2**40])
def test_an_echoed_prompt_of_ids_out_of_the_vocabulary_is_refused(server: LiveServer, token: int) -> None:
    error = refused(server.post("/v1/completions", {"model": MODEL, "prompt": [5, token], "echo": True}), 400)
    assert "prompt" in error["message"] or "token id" in error["message"]
