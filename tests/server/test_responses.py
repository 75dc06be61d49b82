"""POST /v1/responses, by the official client: whole, streamed, with tools; what needs memory is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseStreamEvent,
)
from pydantic import TypeAdapter
from scripted_model import engine_options, says
from served_model import MODEL, ServedModel, serving

from kvpage_server.protocol.responses import ResponsesRequest

URL = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
TEXT = "Paged attention."


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServedModel]:
    with serving(
        tiny, engine=engine_options(), enable_auto_tool_choice=True, tool_call_parser="hermes"
    ) as running:
        yield running


def respond(server: ServedModel, said: str, /, **fields: Any) -> dict[str, Any]:
    """The body of the answer ``said``; it must fit the client's own types, strictly."""
    answer = server.post(URL, **{"input": "hi", "max_output_tokens": 200, **says(server, said), **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    Response.model_validate_json(answer.text, strict=True)
    return body


def events_of(server: ServedModel, text: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each must fit the client's own types, strictly."""
    answer = server.post(URL, **{"input": "hi", "stream": True, **says(server, text), **fields})
    assert answer.status_code == 200, answer.text
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = []
    for block in answer.text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        adapter.validate_json(data.removeprefix("data: "), strict=True)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_the_official_client_reads_the_text(server: ServedModel) -> None:
    answer = server.client.responses.create(
        model=MODEL, input="hi", instructions="Be short.", temperature=0.5, extra_body=says(server, TEXT)
    )
    assert answer.output_text == TEXT
    assert (answer.status, answer.model, answer.instructions, answer.temperature) == (
        "completed", MODEL, "Be short.", 0.5,
    )  # fmt: skip
    assert answer.id.startswith("resp_")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.usage.output_tokens > 0
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", "completed")


def test_an_answer_fits_the_clients_types_strictly(server: ServedModel) -> None:
    body = respond(server, TEXT, metadata={"a": "b"}, user="me", tools=[TOOL], top_p=0.5)
    assert body["metadata"] == {"a": "b"}
    assert body["tools"] == [TOOL]
    assert body["top_p"] == 0.5
    assert body["store"] is False


def test_an_answer_that_is_cut_off_is_incomplete(server: ServedModel) -> None:
    body = respond(server, TEXT, max_output_tokens=3)
    assert body["status"] == body["output"][-1]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["usage"]["output_tokens"] == 3


def test_a_prompt_has_the_tokens_of_the_same_chat(server: ServedModel) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]
    chat = server.post("/v1/chat/completions", messages=messages, max_tokens=1).json()
    body = respond(server, TEXT, instructions="Be short.")
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    parts = [{"role": "developer", "content": [{"type": "input_text", "text": "Be short."}]},
             {"type": "message", "role": "user", "content": "hi"}]  # fmt: skip
    assert respond(server, TEXT, input=parts)["usage"]["input_tokens"] == body["usage"]["input_tokens"]


def test_a_stream_tells_each_item_from_its_beginning_to_its_end(server: ServedModel) -> None:
    events = events_of(server, "Let me see. " + CALL, tools=[TOOL])
    kinds = [event["type"].removeprefix("response.") for event in events]
    once = [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]
    assert once == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "Let me see."
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"city": "Köln"}
    assert len(deltas) > 3
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert added[0]["content"] == []
    assert added[1]["arguments"] == ""
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    assert [item["id"] for item in added] == [item["id"] for item in done]
    assert events[-1]["response"]["usage"]["output_tokens"] > 0


def test_a_stream_that_is_cut_off_ends_incomplete(server: ServedModel) -> None:
    events = events_of(server, TEXT, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-2]["item"]["status"] == "incomplete"


def test_an_empty_answer_is_an_empty_message(server: ServedModel) -> None:
    (item,) = respond(server, "")["output"]
    assert item["content"][0]["text"] == ""
    assert events_of(server, "")[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_the_clients_stream_puts_the_answer_together(server: ServedModel) -> None:
    with server.client.responses.stream(
        model=MODEL,
        input="hi",
        tools=[TOOL],
        extra_body=says(server, TEXT + " " + CALL),  # type: ignore[list-item]
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert "response.output_text.delta" in kinds
    assert answer.output_text == TEXT
    call = answer.output[1]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Köln"}


def test_a_function_call_and_its_result_go_around(server: ServedModel) -> None:
    first = server.client.responses.create(
        model=MODEL,
        input="weather?",
        tools=[TOOL],
        extra_body=says(server, CALL),  # type: ignore[list-item]
    )
    (call,) = first.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status, json.loads(call.arguments)) == ("weather", "completed", {"city": "Köln"})
    history: list[Any] = [
        {"role": "user", "content": "weather?"},
        *[item.model_dump(exclude_none=True) for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    second = server.client.responses.create(
        model=MODEL,
        input=history,
        tools=[TOOL],
        extra_body=says(server, "Sunny."),  # type: ignore[list-item]
    )
    assert second.output_text == "Sunny."
    third = server.client.responses.create(
        model=MODEL,
        input=[
            *history,
            *[item.model_dump() for item in second.output],
            {"role": "user", "content": "thanks"},
        ],
        extra_body=says(server, "Welcome."),
    )
    assert third.output_text == "Welcome."


def test_a_named_function_is_called(server: ServedModel) -> None:
    choice = {"type": "function", "name": "weather"}
    body = respond(server, '"city": "Rom"}}</tool_call>', tools=[TOOL], tool_choice=choice)
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert json.loads(body["output"][0]["arguments"]) == {"city": "Rom"}


def test_null_is_accepted_for_every_optional_field(server: ServedModel) -> None:
    names = set(ResponsesRequest.model_fields) - {"input", "logits_processors", "vllm_xargs"}
    assert respond(server, TEXT, **dict.fromkeys(names))["output"][0]["content"][0]["text"] == TEXT


def test_what_has_no_effect_is_named_in_a_header(server: ServedModel) -> None:
    answer = server.post(URL, input="a", max_output_tokens=1, service_tier="auto", colour="blue")
    assert answer.headers["x-kvpage-ignored-fields"] == "service_tier,colour"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"reasoning": {"effort": 5}}, "reasoning"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "messages"),
        ({"input": [{"content": "a"}]}, "messages"),
        ({"input": None}, "body.input.str"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_wrong_request_is_refused_by_name(server: ServedModel, fields: dict[str, Any], param: str) -> None:
    status, named, message = server.refusal(URL, **{"input": "hi", **fields})
    assert (status, named) == (400, param), message
