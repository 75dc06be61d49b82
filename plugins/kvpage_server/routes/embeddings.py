"""POST /v1/embeddings: pooled hidden states of the model, one vector an input."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage import EmbeddingOutput
from kvpage_server import generation
from kvpage_server.body import documented, read_body
from kvpage_server.errors import bad_request, shutting_down
from kvpage_server.generation import Prepared
from kvpage_server.inputs import given_prompts
from kvpage_server.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from kvpage_server.rendering import render
from kvpage_server.replies import json_reply, new_answer_id
from kvpage_server.request_log import remember
from kvpage_server.sampling import ignored_header
from kvpage_server.service import Service
from kvpage_server.streams import results

MANY_NUMBERS = 50_000
"""Numbers from which on writing them out would hold up other streams."""


def router(service: Service) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", tags=["embeddings"], **documented(EmbeddingRequest, EmbeddingResponse))
    async def create_embedding(request: Request) -> Response:
        """One vector for each input."""
        body = await read_body(request, EmbeddingRequest)
        return await answer(service, request, body)

    return routes


async def answer(service: Service, request: Request, body: EmbeddingRequest) -> Response:
    """The answer to a request whose body is read."""
    model = service.model_name(body.model)
    headers = ignored_header(body, service.settings)
    as_text = _as_base64(body)
    if body.dimensions is not None:
        raise bad_request(
            f"dimensions={body.dimensions} is not supported: the leading numbers of a vector mean something by "
            "themselves only in models that were trained for it (Matryoshka), which nothing tells of this one; "
            "leave it out",
            "dimensions",
        )
    priority = generation.priority_of(request, body, service)
    salt = generation.salt_of(body)
    prompts = await asyncio.to_thread(_prepare, service, body)
    answer_id = new_answer_id("embd", request, body.request_id)
    handles = _submit(service, prompts, body, answer_id, priority, salt)
    remember(request.scope, handles)
    found = await results(service, handles, request.receive)
    if any(output.finish_reason != "stop" for output in found):
        raise shutting_down()
    write = _base64 if as_text else list
    if sum(len(output.embedding) for output in found) > MANY_NUMBERS:
        return await asyncio.to_thread(_reply, answer_id, model, found, write, headers)
    return _reply(answer_id, model, found, write, headers)


def _as_base64(body: EmbeddingRequest) -> bool:
    if body.encoding_format not in (None, "float", "base64"):
        raise bad_request(
            f"encoding_format must be 'float' or 'base64', got {body.encoding_format[:40]!r}",
            "encoding_format",
        )
    return body.encoding_format == "base64"


def _prepare(service: Service, body: EmbeddingRequest) -> list[Prepared]:
    """The inputs in their order."""
    if (body.input is None) == (body.messages is None):
        raise bad_request("give either input or messages", "input")
    if body.messages is not None:
        chat = render(service, body, open_turn=False)
        ids = generation.tokenize(service, chat, add_special_tokens=bool(body.add_special_tokens))
        return [Prepared(chat, generation.truncated(ids, body, service, None))]
    prepared = []
    for prompt in given_prompts(body.input, service, "input"):
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            ids = generation.tokenize(
                service, prompt, add_special_tokens=body.add_special_tokens is not False
            )
        else:
            ids = prompt
        prepared.append(Prepared(text, generation.truncated(ids, body, service, None)))
    return prepared


def _submit(
    service: Service,
    prompts: Sequence[Prepared],
    body: EmbeddingRequest,
    answer_id: str,
    priority: int,
    salt: str | None,
) -> list[Any]:
    """One engine request an input; all, or none."""
    handles: list[Any] = []
    try:
        for index, prompt in enumerate(prompts):
            handles.append(
                service.engine.embed(
                    {"prompt": prompt.text, "prompt_token_ids": prompt.ids},
                    pooling=service.settings.pooling,
                    normalize=body.normalize is not False,
                    request_id=f"{answer_id}-{index}-{secrets.token_hex(4)}",
                    priority=priority,
                    cache_salt=salt,
                )
            )
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    service.open.update(handles)
    return handles


def _reply(
    answer_id: str, model: str, found: Sequence[EmbeddingOutput], write: Any, headers: dict[str, str]
) -> Response:
    data = [
        {"index": index, "object": "embedding", "embedding": write(output.embedding)}
        for index, output in enumerate(found)
    ]
    tokens = sum(len(output.prompt_token_ids) for output in found)
    cached = sum(output.num_cached_tokens for output in found)
    return json_reply(
        {
            "id": answer_id,
            "object": "list",
            "created": generation.now(),
            "model": model,
            "data": data,
            "usage": generation.usage(tokens, 0, cached),
        },
        headers,
    )


def _base64(vector: array[float]) -> str:
    """Little-endian 32-bit floats, whatever this machine's order is."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()
