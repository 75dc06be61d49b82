"""Tool calls of chat completions, by the official client: whole, streamed, chosen, forced, and in the history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from scripted_model import engine_options, says
from served_model import MODEL, ServedModel, serving

URL = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
ASK: list[Any] = [{"role": "user", "content": "How is it in Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln 😀"}}\n</tool_call>'
SECOND = '\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServedModel]:
    with serving(
        tiny, engine=engine_options(), enable_auto_tool_choice=True, tool_call_parser="hermes"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[ServedModel]:
    with serving(
        tiny, engine=engine_options(), enable_auto_tool_choice=True, tool_call_parser="llama3_json"
    ) as running:
        yield running


def ask(server: ServedModel, text: str, **fields: Any) -> ChatCompletion:
    """The answer of a model that writes ``text``."""
    given = {"messages": ASK, "tools": [WEATHER, ADD], "max_tokens": 300, **fields}
    return server.client.chat.completions.create(model=MODEL, extra_body=says(server, text), **given)


def calls_of(answer: ChatCompletion) -> list[tuple[str, Any]]:
    calls = answer.choices[0].message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.type == "function" for call in calls)
    return [
        (call.function.name, json.loads(call.function.arguments)) for call in calls if call.type == "function"
    ]


def streamed(server: ServedModel, text: str, **fields: Any) -> tuple[str, list[dict[str, str]], str | None]:
    """(content, calls, finish reason) of a stream, put together as clients do."""
    given = {"messages": ASK, "tools": [WEATHER, ADD], "max_tokens": 300, **fields}
    content, calls, reason = "", list[dict[str, str]](), None
    for chunk in server.client.chat.completions.create(
        model=MODEL, stream=True, extra_body=says(server, text), **given
    ):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            assert part.function is not None
            if part.id is not None:
                assert part.index == len(calls)
                assert part.type == "function"
                assert part.function.name is not None
                calls.append({"name": part.function.name, "arguments": "", "pieces": ""})
            calls[part.index]["arguments"] += part.function.arguments or ""
            calls[part.index]["pieces"] += "|"
        assert reason is None
        reason = choice.finish_reason
    return content, calls, reason


def test_a_call_is_found_and_ends_the_turn(server: ServedModel) -> None:
    answer = ask(server, CALL)
    assert calls_of(answer) == [("weather", {"city": "Köln 😀"})]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None


def test_text_beside_calls_stays_content(server: ServedModel) -> None:
    answer = ask(server, "Let me see.\n" + CALL + SECOND)
    assert answer.choices[0].message.content == "Let me see."
    assert calls_of(answer) == [("weather", {"city": "Köln 😀"}), ("add", {"a": 1})]


def test_plain_text_and_broken_calls_are_content(server: ServedModel) -> None:
    for text in ("No tool needed.", '<tool_call>{"name": weather}</tool_call>', "<tool_call>"):
        answer = ask(server, text)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"


def test_a_call_that_is_cut_off_is_content_and_ends_for_its_length(server: ServedModel) -> None:
    answer = ask(server, CALL, max_tokens=12)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"


def test_without_parallel_calls_the_first_is_answered(server: ServedModel) -> None:
    assert calls_of(ask(server, CALL + SECOND, parallel_tool_calls=False)) == [
        ("weather", {"city": "Köln 😀"})
    ]
    _, calls, _ = streamed(server, CALL + SECOND, parallel_tool_calls=False)
    assert [call["name"] for call in calls] == ["weather"]


def test_a_stream_gives_arguments_while_they_grow(server: ServedModel) -> None:
    content, calls, reason = streamed(server, "Let me see. " + CALL + SECOND)
    assert content == "Let me see."
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Köln 😀"}),
        ("add", {"a": 1}),
    ]
    assert len(calls[0]["pieces"]) > 3
    assert reason == "tool_calls"


def test_a_stream_of_plain_text_is_plain_text(server: ServedModel) -> None:
    assert streamed(server, "a < b <tool> c") == ("a < b <tool> c", [], "stop")


def test_the_clients_own_accumulation_reads_the_stream(server: ServedModel) -> None:
    with server.client.chat.completions.stream(
        model=MODEL,
        messages=ASK,
        tools=[WEATHER, ADD],
        max_tokens=300,
        extra_body=says(server, CALL),  # type: ignore[list-item]
    ) as stream:
        answer = stream.get_final_completion()
    assert calls_of(answer) == [("weather", {"city": "Köln 😀"})]  # type: ignore[arg-type]


def test_every_choice_has_calls_of_its_own(server: ServedModel) -> None:
    answer = ask(server, CALL, n=2, temperature=1.0)
    ids = [choice.message.tool_calls[0].id for choice in answer.choices if choice.message.tool_calls]
    assert len(set(ids)) == 2


def test_none_leaves_text_alone(server: ServedModel) -> None:
    answer = ask(server, CALL, tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].finish_reason == "stop"


def test_a_named_function_is_called_whatever_the_model_would_have_said(server: ServedModel) -> None:
    answer = ask(server, '"city": "Paris"}}</tool_call> and so on', tool_choice=NAMED)
    assert calls_of(answer) == [("weather", {"city": "Paris"})]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content is None
    content, calls, reason = streamed(server, '"city": "Paris"}}</tool_call>!', tool_choice=NAMED)
    assert (content, reason) == ("", "stop")
    assert [(call["name"], call["arguments"]) for call in calls] == [("weather", '{"city": "Paris"}')]


def test_a_named_call_that_is_cut_off_keeps_what_there_is(server: ServedModel) -> None:
    answer = ask(server, '"city": "Paris, the capital', tool_choice=NAMED, max_tokens=5)
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert call.function.arguments.startswith('{"city')
    assert answer.choices[0].finish_reason == "length"


def test_required_begins_a_call_and_leaves_the_choice_of_it(server: ServedModel) -> None:
    answer = ask(server, ' "add", "arguments": {"a": 2}}\n</tool_call>', tool_choice="required")
    assert calls_of(answer) == [("add", {"a": 2})]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_the_prompt_shows_tools_calls_and_results(server: ServedModel) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Paris"}'},
    }
    history = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    body = {"messages": history, "tools": [WEATHER], "max_tokens": 1, "return_prompt_text": True}
    prompt = server.post(URL, **body).json()["prompt_text"]
    assert '"description": "Tells the weather."' in prompt
    assert '<|assistant|>CALL weather {"city": "Paris"}<|tool|>sunny<|assistant|>' in prompt


def test_an_answer_can_be_sent_back_as_it_came(server: ServedModel) -> None:
    message = ask(server, CALL).choices[0].message
    history = [*ASK, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]  # type: ignore[index]
    answer = ask(server, "It is sunny.", messages=history)
    assert answer.choices[0].message.content == "It is sunny."


def test_llamas_form_is_read_too(llama: ServedModel) -> None:
    text = '{"name": "weather", "parameters": {"city": "Rom"}}; {"name": "add", "parameters": {}}'
    assert calls_of(ask(llama, text)) == [("weather", {"city": "Rom"}), ("add", {})]
    content, calls, reason = streamed(llama, text)
    assert (content, reason) == ("", "tool_calls")
    assert [call["name"] for call in calls] == ["weather", "add"]
    assert calls_of(ask(llama, '"city": "Rom"}}', tool_choice=NAMED)) == [("weather", {"city": "Rom"})]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": NAMED}, "tool_choice"),
    ],
)
def test_a_wrong_request_is_refused_by_name(server: ServedModel, fields: dict[str, Any], param: str) -> None:
    status, named, message = server.refusal(URL, messages=ASK, **fields)
    assert (status, named) == (400, param), message


def test_null_means_no_tools(server: ServedModel) -> None:
    answer = ask(server, "Fine.", tools=None, tool_choice=None, parallel_tool_calls=None)
    assert answer.choices[0].message.content == "Fine."


def test_a_server_without_the_flags_says_which(tiny: Path) -> None:
    with serving(tiny) as plain:
        _, param, message = plain.refusal(URL, messages=ASK, tools=[ADD])
        assert param == "tool_choice"
        assert "--enable-auto-tool-choice" in message
        assert (
            "--tool-call-parser" in plain.refusal(URL, messages=ASK, tools=[ADD], tool_choice="required")[2]
        )


def test_a_template_that_shows_no_tools_is_told_of(tiny: Path) -> None:
    with serving(tiny, enable_auto_tool_choice=True, tool_call_parser="hermes") as plain:
        status, param, message = plain.refusal(URL, messages=ASK, tools=[ADD])
        assert (status, param) == (400, "tools")
        assert "chat template" in message
