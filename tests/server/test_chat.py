"""POST /v1/chat/completions, whole answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import HELLO, MODEL, LiveServer, answered, live_server, refused

from kvpage import AsyncEngine


@pytest.fixture(scope="module")
def trusting(engine: AsyncEngine) -> Iterator[LiveServer]:
    with live_server(
        engine, trust_request_chat_template=True, response_role="bot", strict_fields=True
    ) as server:
        yield server


def message(server: LiveServer, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = server.chat(**body)["choices"][0]["message"]
    return found


def test_an_answer_has_the_form_that_clients_read(server: LiveServer) -> None:
    answer = server.chat(max_tokens=5, ignore_eos=True)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    (only,) = answer["choices"]
    assert only["message"] == {
        "role": "assistant", "content": only["message"]["content"], "refusal": None, "annotations": None,
        "audio": None, "function_call": None, "reasoning": None,
    }  # fmt: skip
    assert only["message"]["content"]
    assert only["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5


def test_messages_alone_are_enough_and_the_answer_may_fill_the_context(server: LiveServer) -> None:
    answer = answered(server.post("/v1/chat/completions", {**HELLO, "ignore_eos": True}))
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_wins_over_max_tokens(server: LiveServer) -> None:
    usage = server.chat(max_tokens=9, max_completion_tokens=3, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 3


def test_every_optional_field_may_be_null(server: LiveServer) -> None:
    names = (
        "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
        "reasoning_effort", "include_reasoning", "add_generation_prompt", "continue_final_message", "documents",
        "chat_template", "chat_template_kwargs", "return_prompt_text", "functions", "function_call", "stop", "stream",
        "stream_options", "response_format", "n", "seed", "user", "logit_bias", "echo", "metadata", "store",
    )  # fmt: skip
    answered(server.post("/v1/chat/completions", {**HELLO, "max_tokens": 2, **dict.fromkeys(names)}))


def test_the_chat_template_writes_the_prompt(server: LiveServer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "four"},
    ]
    answer = server.chat(messages=messages, max_tokens=1, return_prompt_text=True, return_token_ids=True)
    expected = "<s><|user|>one\ntwo<|assistant|>three<|user|>four<|assistant|>"
    assert answer["prompt_text"] == expected
    tokenizer = server.service.engine.tokenizer
    assert tokenizer is not None
    assert answer["prompt_token_ids"] == tokenizer.encode(expected, add_special_tokens=False)


def test_a_last_message_may_be_continued_and_echoed(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "The block"}]
    fields = {"messages": messages, "max_tokens": 3, "continue_final_message": True}
    plain = server.chat(**fields, return_prompt_text=True)
    assert plain["prompt_text"].endswith("<|assistant|>The block")
    echoed = message(server, **fields, echo=True)["content"]
    assert echoed == "The block" + plain["choices"][0]["message"]["content"]


def test_logprobs_name_bytes_and_as_many_alternatives_as_asked_for(server: LiveServer) -> None:
    (only,) = server.chat(max_tokens=4, logprobs=True, top_logprobs=2, ignore_eos=True)["choices"]
    content = only["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
    assert text == only["message"]["content"]
    (bare,) = server.chat(max_tokens=1, logprobs=True)["choices"]
    assert bare["logprobs"]["content"][0]["top_logprobs"] == []


def test_choices_are_numbered_and_differ(server: LiveServer) -> None:
    choices = server.chat(n=3, temperature=2, max_tokens=12, seed=3)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) > 1


def test_a_template_from_a_request_is_refused_unless_the_server_allows_it(
    server: LiveServer, trusting: LiveServer
) -> None:
    body = {**HELLO, "chat_template": "{{ messages[0].content }}!{{ mood }}", "max_tokens": 1}
    error = refused(server.post("/v1/chat/completions", body), 400)
    assert error["param"] == "chat_template"
    answer = trusting.chat(
        chat_template=body["chat_template"],
        chat_template_kwargs={"mood": "?"},
        return_prompt_text=True,
        max_tokens=1,
    )
    assert answer["prompt_text"] == "Hello!?"
    assert answer["choices"][0]["message"]["role"] == "bot"


@pytest.mark.parametrize("name", ["messages", "chat_template", "tools", "add_generation_prompt"])
def test_template_arguments_cannot_stand_in_for_fields_that_are_checked(
    server: LiveServer, name: str
) -> None:
    body = {**HELLO, "chat_template_kwargs": {name: "x"}}
    assert refused(server.post("/v1/chat/completions", body), 400)["param"] == "chat_template_kwargs"


def test_unknown_fields_are_refused_where_the_server_is_strict(trusting: LiveServer) -> None:
    assert refused(trusting.post("/v1/chat/completions", {**HELLO, "bset_of": 1}), 400)["param"] == "bset_of"
    assert trusting.chat(max_tokens=1)["choices"]


def test_a_reasoning_effort_that_the_template_does_not_read_is_named(server: LiveServer) -> None:
    response = server.post("/v1/chat/completions", {**HELLO, "reasoning_effort": "low", "max_tokens": 1})
    assert response.headers["x-kvpage-ignored-fields"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(server: LiveServer, body: dict[str, Any], param: str) -> None:
    assert refused(server.post("/v1/chat/completions", {**HELLO, **body}), 400)["param"] == param
