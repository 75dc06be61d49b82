"""The official client, with every answer held to the client's own types."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live_server import MODEL, LiveServer, live_server
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from kvpage import AsyncEngine

MESSAGES: Any = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Explain PagedAttention"},
]


def strictly(kind: type[BaseModel], answer: BaseModel) -> None:
    """The client itself does not validate; this does, literals and all."""
    kind.model_validate(answer.model_dump(exclude_unset=True), strict=True)


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not-needed", max_retries=0) as client:
        yield client


def test_a_chat_completion_has_the_client_s_types(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=8,
        n=2,
        temperature=1,
        logprobs=True,
        top_logprobs=2,
        seed=1,
    )
    strictly(ChatCompletion, answer)
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.choices[1].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None


def test_a_completion_has_the_client_s_types(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["The block", "Paged"],
        max_tokens=8,
        logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    strictly(Completion, answer)
    assert len(answer.choices) == 2


def test_chunks_of_a_chat_have_the_client_s_types_and_always_a_choice(client: openai.OpenAI) -> None:
    text = ""
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, max_tokens=8):
        strictly(ChatCompletionChunk, chunk)
        text += chunk.choices[0].delta.content or ""  # no chunk without choices unless usage was asked for
    assert text


def test_a_stream_may_end_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options=options, max_tokens=4
        )
    )
    for chunk in chunks:
        strictly(ChatCompletionChunk, chunk)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


def test_chunks_of_a_completion_have_the_client_s_types(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(model=MODEL, prompt="The block", stream=True, max_tokens=8, logprobs=1)
    )
    assert chunks
    for chunk in chunks:
        # The type leaves no room for a choice that goes on, and OpenAI's own chunks say null there as well.
        chunk.choices[0].finish_reason = chunk.choices[0].finish_reason or "stop"
        strictly(Completion, chunk)


def test_the_stream_helper_puts_a_message_together(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    assert whole
    with client.chat.completions.stream(**fields, stop=whole[5:8]) as stream:
        stream.until_done()
        answer = stream.get_final_completion().choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content == whole[: whole.index(whole[5:8])]


def test_raw_answers_carry_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, extra_headers={"X-Request-Id": "raw-1"}
    )
    assert raw.headers["x-request-id"] == "raw-1"
    assert raw.parse().id == "chatcmpl-raw-1"
    assert raw.parse()._request_id == "raw-1"


def test_models_are_listed_and_found_by_ids_with_slashes(client: openai.OpenAI) -> None:
    models = client.models.list().data
    for model in models:
        strictly(Model, model)
    assert client.models.retrieve(models[0].id).id == MODEL


def test_the_async_client_talks_to_many_streams_at_once(server: LiveServer) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

            async def one(index: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, stream=True, max_tokens=5, seed=index
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(index) for index in range(20)))

    assert all(asyncio.run(talk()))


def test_a_stream_that_is_closed_early_frees_its_blocks(client: openai.OpenAI, server: LiveServer) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "input_tokens"),
    ],
)
def test_errors_are_the_client_s_own(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})
    assert caught.value.body is not None
    assert caught.value.param == param
    assert caught.value.code == str(caught.value.status_code)


def test_a_wrong_key_is_an_authentication_error(engine: AsyncEngine) -> None:
    with (
        live_server(engine, api_keys=("right",)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            client.models.list()
        assert client.with_options(api_key="right").models.list().data
