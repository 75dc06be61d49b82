"""POST /v1/responses: the stateless part of OpenAI's newer API, on the ground of chat completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage_server import generation
from kvpage_server.body import IN_A_THREAD, documented, read_body
from kvpage_server.protocol.responses import ResponseObject, ResponsesRequest
from kvpage_server.replies import json_reply, new_answer_id
from kvpage_server.request_log import remember
from kvpage_server.response_answers import ResponseChunks, ResponseStyle, whole
from kvpage_server.response_items import WITHOUT_EFFECT, as_chat
from kvpage_server.routes.chat import prepare
from kvpage_server.sampling import ignored_header, sampling_params
from kvpage_server.service import Service
from kvpage_server.streams import EventStream, outputs
from kvpage_server.tools.choice import plan_tools


def router(service: Service) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter()

    @routes.post(
        "/v1/responses", tags=["generation"], **documented(ResponsesRequest, ResponseObject, streams=True)
    )
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in OpenAI's newer form; nothing of it is stored."""
        body = await read_body(request, ResponsesRequest)
        return await answer(service, request, body)

    return routes


async def answer(service: Service, request: Request, body: ResponsesRequest) -> Response:
    """The answer to a request whose body is read."""
    model = service.model_name(body.model)
    chat = as_chat(body)
    tools = plan_tools(service.settings, chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    params = sampling_params(
        chat,
        service,
        max_tokens=chat.max_completion_tokens,
        logprobs=None,
        prompt_logprobs=None,
        **({"skip_special_tokens": False} if tools.special_tokens else {}),
    )
    priority, salt = generation.priority_of(request, body, service), generation.salt_of(body)
    if len(await request.body()) > IN_A_THREAD:
        prompt, unused = await asyncio.to_thread(prepare, service, chat, tools, params.max_tokens)
    else:
        prompt, unused = prepare(service, chat, tools, params.max_tokens)
    said = [name for name in WITHOUT_EFFECT if getattr(body, name) is not None]
    headers = ignored_header(body, service.settings, *said, *unused)
    answer_id = new_answer_id("resp", request, body.request_id).replace("-", "_", 1)
    handles = generation.submit(
        service, [prompt], params, answer_id=answer_id, priority=priority, cache_salt=salt
    )
    remember(request.scope, handles)
    headers |= generation.clamp_note(service, [prompt], params.max_tokens)
    style = ResponseStyle(
        answer_id=answer_id,
        created=generation.now(),
        model=model,
        body=body,
        prompt=prompt,
        temperature=params.temperature,
        top_p=params.top_p,
        tools=tools,
    )
    if body.stream:
        return EventStream(service, handles, ResponseChunks(style, handles[0]), headers, answer_id)
    (output,) = await outputs(service, handles, request.receive)
    return json_reply(whole(style, output), headers)
