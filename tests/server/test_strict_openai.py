"""OpenAI's own client, told to validate every type of every answer; and the requests that other clients send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from live_server import MODEL, LiveServer, answered

TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
HELLO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "The block", "max_tokens": 6}
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 6}


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="EMPTY",
        max_retries=0,
        timeout=30,
        _strict_response_validation=True,
    ) as strict:
        yield strict


@asynccontextmanager
async def asynchronous(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="EMPTY",
        max_retries=0,
        timeout=30,
        _strict_response_validation=True,
    ) as strict:
        yield strict


@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": 2}, {"logprobs": 0}, {"echo": True}, {"n": 3}, {"prompt": ["a", "b"]},
     {"prompt": [5, 6]}, {"stop": ["e"]}, {"max_tokens": 1}, {"seed": 1, "user": "me", "suffix": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_completions_have_the_types_that_the_client_declares(
    server: LiveServer, client: openai.OpenAI, fields: dict[str, Any], stream: bool
) -> None:
    reasons: list[Any] = []
    if stream:
        # The client declares a finish_reason in every chunk; OpenAI, and so everybody, sends null until the last.
        options = {"stream_options": {"include_usage": True}}
        *chunks, last, done = server.stream("/v1/completions", {**TEXT, **fields, **options})
        assert (last["choices"], done) == ([], "[DONE]")
        for chunk in chunks:
            (choice,) = chunk["choices"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        for chunk in (*chunks, last):
            openai.types.Completion.model_validate(chunk)
    else:
        answer = client.completions.create(**{**TEXT, **fields})
        assert isinstance(answer, openai.types.Completion)
        reasons += [choice.finish_reason for choice in answer.choices]
    assert len(reasons) == fields.get("n", 1) * (2 if fields.get("prompt") == ["a", "b"] else 1)
    assert set(reasons) <= {"stop", "length"}


@pytest.mark.parametrize(
    "fields",
    [{}, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"n": 2}, {"stop": "e"}, {"tools": TOOLS,
     "tool_choice": "none"}, {"response_format": {"type": "text"}}, {"seed": 1, "temperature": 0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_chats_have_the_types_that_the_client_declares(
    client: openai.OpenAI, fields: dict[str, Any], stream: bool
) -> None:
    n = fields.get("n", 1)
    if not stream:
        answer = client.chat.completions.create(**{**CHAT, **fields})
        assert isinstance(answer, openai.types.chat.ChatCompletion)
        assert [choice.message.role for choice in answer.choices] == ["assistant"] * n
        assert all(isinstance(choice.message.content, str) for choice in answer.choices)
        return
    chunks = list(client.chat.completions.create(**{**CHAT, **fields}, stream=True))  # type: ignore[call-overload]
    assert all(len(chunk.choices) == 1 for chunk in chunks), "client code reads choices[0] of every chunk"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index in range(n):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert [choice.finish_reason for choice in own].count(None) == len(own) - 1


def test_the_clients_own_accumulation_of_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    fixed: dict[str, Any] = {**CHAT, "temperature": 0, "max_tokens": 20, "extra_body": {"ignore_eos": True}}
    text = client.chat.completions.create(**fixed).choices[0].message.content
    assert text
    fixed["stop"] = text[4:7]  # the helper calls "length" an error
    whole = client.chat.completions.create(**fixed)
    with client.chat.completions.stream(**fixed, stream_options={"include_usage": True}) as stream:
        assert [event.type for event in stream].count("content.done") == 1
        gathered = stream.get_final_completion()
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.usage is not None
    assert whole.usage is not None
    assert gathered.usage.completion_tokens == whole.usage.completion_tokens


def test_models_embeddings_and_raw_answers(client: openai.OpenAI, server: LiveServer) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).object == "model"
    # Left to itself the client asks for base64 and unpacks it, which its own strict mode does not expect.
    lenient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    dense = lenient.embeddings.create(model=MODEL, input=["a b", "c"])
    plain = client.embeddings.create(model=MODEL, input=["a b", "c"], encoding_format="float")
    assert dense.data[0].embedding == pytest.approx(plain.data[0].embedding)
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].finish_reason in ("stop", "length")
    with client.completions.with_streaming_response.create(**TEXT) as response:
        assert response.parse().object == "text_completion"
    assert server.service.load == 0


def test_responses_have_the_types_that_the_client_declares(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=16)
    assert answer.output_text
    kinds = [
        event.type
        for event in client.responses.create(model=MODEL, input="Hello", max_output_tokens=16, stream=True)
    ]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_every_error_is_the_clients_own_type_with_body_code_and_param(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert (missing.value.param, missing.value.status_code) == ("model", 404)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(**{**TEXT, "n": 0})
    assert wrong.value.param == "n"
    assert isinstance(wrong.value.body, dict)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(**{**TEXT, "prompt": [5] * 600})


def test_the_asynchronous_client_streams_and_gathers(server: LiveServer) -> None:
    async def all_at_once() -> None:
        async with asynchronous(server) as client:

            async def streamed() -> str:
                stream = await client.chat.completions.create(**CHAT, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            answers = await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(4)))
            assert all(answer.usage for answer in answers)
            assert all(
                isinstance(text, str) for text in await asyncio.gather(*(streamed() for _ in range(4)))
            )
            stream = await client.chat.completions.create(**{**CHAT, "max_tokens": 400}, stream=True)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(all_at_once())
    server.wait_until_idle()


def test_a_request_of_lm_eval(server: LiveServer) -> None:
    body = {
        "model": MODEL, "prompt": [[5, 6, 7], [8, 9]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0,
        "seed": 1234,
    }  # fmt: skip
    choices = answered(server.post("/v1/completions", body))["choices"]
    for choice, ids in zip(choices, body["prompt"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(ids) + 1
        assert logprobs["token_logprobs"][0] is None
        for value, top in zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True):
            assert value <= max(top.values())


def test_a_request_of_guidellm(server: LiveServer) -> None:
    assert server.client.get("/health").status_code == 200
    model = answered(server.client.get("/v1/models"))["data"][0]["id"]
    common = {
        "model": model, "stop": None, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    for path, body in (
        ("/v1/completions", {"prompt": "a b c", "max_tokens": 7}),
        ("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": 7}),
    ):
        *events, done = server.stream(path, {**common, **body})
        assert done == "[DONE]"
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == 7
        assert events[-1]["choices"] == []


def test_a_request_of_vllm_bench_serve(server: LiveServer) -> None:
    body = {
        "model": MODEL, "prompt": "a b c", "repetition_penalty": 1.0, "max_tokens": 5, "logprobs": None,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    *events, done = server.stream("/v1/completions", body)
    assert done == "[DONE]"
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert all("usage" not in event or event["usage"] is None for event in events[:-1])


def test_token_arrays_as_langchains_embeddings_send_them(server: LiveServer) -> None:
    body = {"model": MODEL, "input": [[5, 6, 7], [8]], "encoding_format": "base64"}
    data = answered(server.post("/v1/embeddings", body))["data"]
    assert [entry["index"] for entry in data] == [0, 1]
