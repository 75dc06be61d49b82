"""Streams: the chunks add up to the whole answer, and every one has the form that clients read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import HELLO, MODEL, LiveServer, live_server

from kvpage import AsyncEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT: dict[str, Any] = {"prompt": "The block", "temperature": 0}


def texts(events: list[Any], of_chat: bool) -> dict[int, str]:
    """The text of each choice."""
    found: dict[int, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            gained = choice["delta"].get("content", "") if of_chat else choice["text"]
            found[choice["index"]] = found.get(choice["index"], "") + gained
    return found


def ends(events: list[Any]) -> dict[int, list[str]]:
    """Every finish_reason that each choice was given."""
    found: dict[int, list[str]] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).extend(filter(None, [choice["finish_reason"]]))
    return found


def test_a_stream_of_completions_adds_up_to_the_whole_answer(server: LiveServer) -> None:
    whole = server.complete(max_tokens=12, ignore_eos=True)
    events = server.stream(COMPLETIONS, {**PROMPT, "max_tokens": 12, "ignore_eos": True})
    assert events[-1] == "[DONE]"
    assert texts(events, False) == {0: whole["choices"][0]["text"]}
    assert ends(events) == {0: ["length"]}
    assert {(e["id"], e["object"], e["created"], e["model"]) for e in events[:-1]} == {
        (events[0]["id"], "text_completion", events[0]["created"], MODEL)
    }
    assert all(event["choices"] and "usage" not in event for event in events[:-1])


def test_a_stream_of_chat_begins_with_the_role_and_adds_up(server: LiveServer) -> None:
    whole = server.chat(max_tokens=12, ignore_eos=True)
    events = server.stream(CHAT, {**HELLO, "temperature": 0, "max_tokens": 12, "ignore_eos": True})
    assert events[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert events[0]["object"] == "chat.completion.chunk"
    assert texts(events, True) == {0: whole["choices"][0]["message"]["content"]}
    assert ends(events) == {0: ["length"]}
    assert [event for event in events[1:-1] if "role" in event["choices"][0]["delta"]] == []


def test_several_choices_interleave_and_each_ends_once(server: LiveServer) -> None:
    body = {**HELLO, "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    whole = server.chat(**{name: value for name, value in body.items() if name != "messages"})
    events = server.stream(CHAT, body)
    expected = {choice["index"]: choice["message"]["content"] for choice in whole["choices"]}
    assert texts(events, True) == expected
    assert ends(events) == {0: ["length"], 1: ["length"], 2: ["length"]}


def test_several_prompts_stream_side_by_side(server: LiveServer) -> None:
    prompts = ["The block", "Every request", "Paged"]
    whole = server.complete(prompt=prompts, max_tokens=6, ignore_eos=True)
    events = server.stream(COMPLETIONS, {**PROMPT, "prompt": prompts, "max_tokens": 6, "ignore_eos": True})
    assert texts(events, False) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert sorted(ends(events)) == [0, 1, 2]


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, PROMPT), (CHAT, HELLO)])
def test_usage_comes_in_one_last_chunk_without_choices(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    options = {"include_usage": True}
    events = server.stream(path, {**body, "max_tokens": 5, "ignore_eos": True, "stream_options": options})
    *others, last, done = events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 5
    assert all("usage" not in event for event in others)


def test_usage_may_be_told_in_every_chunk(server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.stream(CHAT, {**HELLO, "max_tokens": 5, "ignore_eos": True, "stream_options": options})
    told = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == 5


def test_continuous_usage_alone_and_empty_options_add_nothing(server: LiveServer) -> None:
    for options in ({}, {"continuous_usage_stats": True}):
        events = server.stream(COMPLETIONS, {**PROMPT, "max_tokens": 2, "stream_options": options})
        assert all("usage" not in event for event in events[:-1])


def test_offsets_of_logprobs_go_on_from_chunk_to_chunk(server: LiveServer) -> None:
    body = {**PROMPT, "max_tokens": 8, "logprobs": 1, "ignore_eos": True, "echo": True}
    whole = server.complete(**{k: v for k, v in body.items() if k != "prompt"})["choices"][0]
    gathered: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    events = server.stream(COMPLETIONS, body)
    for event in events[:-1]:
        for name, entries in event["choices"][0]["logprobs"].items():
            gathered[name] += entries
    assert gathered["tokens"] == whole["logprobs"]["tokens"]
    assert gathered["text_offset"] == whole["logprobs"]["text_offset"]
    assert texts(events, False) == {0: whole["text"]}


def test_logprobs_of_a_chat_stream_are_those_of_the_whole_answer(server: LiveServer) -> None:
    fields = {"max_tokens": 8, "logprobs": True, "top_logprobs": 1, "ignore_eos": True}
    whole = server.chat(**fields)["choices"][0]["logprobs"]["content"]
    events = server.stream(CHAT, {**HELLO, "temperature": 0, **fields})
    entries = [
        entry
        for event in events[:-1]
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in entries] == [entry["token"] for entry in whole]


def test_token_ids_and_the_prompt_s_are_streamed_where_asked_for(server: LiveServer) -> None:
    body = {**PROMPT, "prompt": [1, 40, 41], "max_tokens": 6, "return_token_ids": True, "ignore_eos": True}
    whole = server.complete(**body)["choices"][0]
    events = server.stream(COMPLETIONS, body)
    ids = [token for event in events[:-1] for token in event["choices"][0].get("token_ids", ())]
    assert ids == whole["token_ids"]
    assert events[0]["choices"][0]["prompt_token_ids"] == [1, 40, 41]


def test_echo_without_tokens_streams_the_prompt_and_its_end(server: LiveServer) -> None:
    events = server.stream(COMPLETIONS, {**PROMPT, "max_tokens": 0, "echo": True})
    assert texts(events, False) == {0: "The block"}
    assert ends(events) == {0: ["length"]}


def test_a_code_point_of_several_tokens_comes_whole(server: LiveServer) -> None:
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    *begun, last = tokenizer.encode("🧊", add_special_tokens=False)
    assert begun
    body = {"prompt": [1, 40, *begun], "max_tokens": 2, "allowed_token_ids": [last]}
    events = server.stream(COMPLETIONS, body)
    assert events[0]["choices"][0]["text"].startswith("🧊")


def test_held_back_text_is_shown_at_the_end_and_none_is_lost(server: LiveServer) -> None:
    body = {**PROMPT, "max_tokens": 60, "ignore_eos": True, "temperature": 2, "seed": 11}
    whole = server.complete(**body)["choices"][0]["text"]
    assert texts(server.stream(COMPLETIONS, body), False) == {0: whole}


def test_a_stop_string_is_never_shown_in_part(server: LiveServer) -> None:
    whole = server.complete(max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    stop = whole[4:9]
    events = server.stream(COMPLETIONS, {**PROMPT, "max_tokens": 20, "ignore_eos": True, "stop": [stop]})
    assert texts(events, False) == {0: whole[: whole.index(stop)]}
    assert events[-2]["choices"][0]["stop_reason"] == stop


def test_what_is_refused_before_the_first_chunk_has_a_status_of_its_own(server: LiveServer) -> None:
    response = server.post(COMPLETIONS, {"prompt": [40] * 600, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input_tokens"
    assert response.headers["content-type"] == "application/json"


def test_a_failure_in_mid_stream_is_an_event_and_the_stream_ends(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpage_server.completion_answers import CompletionChunks

    shown = CompletionChunks.chunk
    calls = iter(range(100))

    def chunk(self: CompletionChunks, prompt: int, event: Any) -> bytes:
        if next(calls) == 2:
            raise ValueError("a secret of the server")
        return shown(self, prompt, event)

    monkeypatch.setattr(CompletionChunks, "chunk", chunk)
    events = server.stream(COMPLETIONS, {**PROMPT, "max_tokens": 30, "ignore_eos": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == 500
    assert "secret" not in str(events[-2])
    server.wait_until_idle()  # the rest of the request was given up


def test_silent_streams_are_kept_alive_by_comments(engine: AsyncEngine) -> None:
    with live_server(engine, sse_keep_alive=0.02) as server:
        # The engine's thread is busy with something else, so the request waits for its first token.
        import time

        engine._worker.call(lambda core: time.sleep(0.3))
        with server.client.stream(
            "POST", COMPLETIONS, json={**PROMPT, "stream": True, "max_tokens": 2}
        ) as response:
            text = response.read().decode()
        assert text.startswith(": keep-alive\n\n")
        assert text.endswith("data: [DONE]\n\n")


@pytest.fixture
def generous(engine: AsyncEngine) -> Iterator[LiveServer]:
    with live_server(engine, force_include_usage=True) as server:
        yield server


def test_a_server_may_tell_usage_to_everybody(generous: LiveServer) -> None:
    events = generous.stream(COMPLETIONS, {**PROMPT, "max_tokens": 3})
    assert all(event["usage"] for event in events[:-1])
