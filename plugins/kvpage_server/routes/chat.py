"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage import SamplingParams
from kvpage_server import generation
from kvpage_server.body import IN_A_THREAD, documented, read_body
from kvpage_server.chat_answers import ChatChunks, ChatStyle, whole
from kvpage_server.conversations import chat_options, last_text
from kvpage_server.errors import bad_request
from kvpage_server.generation import Prepared
from kvpage_server.protocol.chat import ChatRequest, ChatResponse
from kvpage_server.replies import json_reply, new_answer_id
from kvpage_server.request_log import remember
from kvpage_server.sampling import ignored_header, refuse_unsupported, sampling_params
from kvpage_server.service import Service
from kvpage_server.streams import EventStream, outputs
from kvpage_server.tools.choice import ToolPlan, plan_tools


def router(service: Service) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions", tags=["generation"], **documented(ChatRequest, ChatResponse, streams=True)
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatRequest)
        return await answer(service, request, body)

    return routes


async def answer(service: Service, request: Request, body: ChatRequest) -> Response:
    """The answer to a request whose body is read."""
    model = service.model_name(body.model)
    refuse_unsupported(body)
    tools = plan_tools(service.settings, body.tools, body.tool_choice, body.parallel_tool_calls)
    params = _params(body, service, keep_special=tools.special_tokens)
    priority = generation.priority_of(request, body, service)
    salt = generation.salt_of(body)
    if len(await request.body()) > IN_A_THREAD:
        prompt, unused = await asyncio.to_thread(prepare, service, body, tools, params.max_tokens)
    else:
        prompt, unused = prepare(service, body, tools, params.max_tokens)
    headers = ignored_header(body, service.settings, *unused)
    answer_id = new_answer_id("chatcmpl", request, body.request_id)
    style = _style(service, body, answer_id, model, params.n, prompt, tools)
    handles = generation.submit(
        service, [prompt], params, answer_id=answer_id, priority=priority, cache_salt=salt
    )
    remember(request.scope, handles)
    headers |= generation.clamp_note(service, [prompt], params.max_tokens)
    if body.stream:
        return EventStream(service, handles, ChatChunks(style, handles[0]), headers, answer_id)
    (output,) = await outputs(service, handles, request.receive)
    return json_reply(whole(style, output), headers)


def prepare(
    service: Service, body: ChatRequest, tools: ToolPlan, max_tokens: int | None
) -> tuple[Prepared, list[str]]:
    """The conversation as a prompt, and the fields that its template did not heed."""
    options, unused = chat_options(service, body)
    text = service.engine.render_chat(options.pop("messages"), **options)
    tools.check_shown(text)
    text += tools.prefix
    ids = generation.tokenize(service, text, add_special_tokens=bool(body.add_special_tokens))
    return Prepared(text, generation.truncated(ids, body, service, max_tokens)), unused


def _params(body: ChatRequest, service: Service, *, keep_special: bool) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if top < 0:
        raise bad_request(f"top_logprobs must be at least 0, got {top}", "top_logprobs")
    more = {"skip_special_tokens": False} if keep_special else {}
    return sampling_params(
        body,
        service,
        max_tokens=max_tokens,
        logprobs=top if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        **more,
    )


def _style(
    service: Service,
    body: ChatRequest,
    answer_id: str,
    model: str,
    n: int,
    prompt: Prepared,
    tools: ToolPlan,
) -> ChatStyle:
    options, settings = body.stream_options, service.settings
    return ChatStyle(
        answer_id=answer_id,
        created=generation.now(),
        model=model,
        fingerprint=service.fingerprint,
        role=settings.response_role if body.add_generation_prompt is not False else last_text(body)[0],
        n=n,
        prompt=prompt,
        tokenizer=service.engine.tokenizer,
        echo=last_text(body)[1] if body.echo else "",
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        show_prompt_logprobs=body.prompt_logprobs is not None,
        as_ids=bool(body.return_tokens_as_token_ids or settings.return_tokens_as_token_ids),
        token_ids=bool(body.return_token_ids),
        prompt_text=bool(body.return_prompt_text),
        tools=tools,
        include_usage=settings.force_include_usage or bool(options and options.include_usage),
        continuous_usage=settings.force_include_usage
        or bool(options and options.include_usage and options.continuous_usage_stats),
    )
