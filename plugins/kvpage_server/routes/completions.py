"""POST /v1/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage import SamplingParams
from kvpage_server import generation
from kvpage_server.body import IN_A_THREAD, documented, read_body
from kvpage_server.completion_answers import CompletionChunks, CompletionStyle, whole
from kvpage_server.errors import bad_request
from kvpage_server.generation import Prepared
from kvpage_server.inputs import given_prompts
from kvpage_server.protocol.completions import CompletionRequest, CompletionResponse
from kvpage_server.replies import json_reply, new_answer_id
from kvpage_server.request_log import remember
from kvpage_server.sampling import ignored_header, refuse_unsupported, sampling_params
from kvpage_server.service import Service
from kvpage_server.streams import EventStream, outputs

DEFAULT_MAX_TOKENS = 16


def router(service: Service) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        tags=["generation"],
        **documented(CompletionRequest, CompletionResponse, streams=True),
    )
    async def create_completion(request: Request) -> Response:
        """Continue one prompt or several."""
        body = await read_body(request, CompletionRequest)
        return await answer(service, request, body)

    return routes


async def answer(service: Service, request: Request, body: CompletionRequest) -> Response:
    """The answer to a request whose body is read."""
    model = service.model_name(body.model)
    refuse_unsupported(body)
    headers = ignored_header(body, service.settings)
    params = _params(body, service)
    big = len(await request.body()) > IN_A_THREAD
    if big:
        given = await asyncio.to_thread(given_prompts, body.prompt, service, "prompt")
    else:
        given = given_prompts(body.prompt, service, "prompt")
    n = params.n
    if n * len(given) > service.settings.max_choices:
        raise bad_request(
            f"{len(given)} prompts with n={n} are more than {service.settings.max_choices} choices: "
            "send fewer at once", "n",
        )  # fmt: skip
    if big:
        prompts = await asyncio.to_thread(_prepare, given, body, service)
    else:
        prompts = _prepare(given, body, service)
    answer_id = new_answer_id("cmpl", request, body.request_id)
    handles = generation.submit(
        service, prompts, params, answer_id=answer_id,
        priority=generation.priority_of(request, body, service), cache_salt=generation.salt_of(body),
    )  # fmt: skip
    remember(request.scope, handles)
    style = _style(
        service, body, answer_id, model, n, prompts
    )  # echoed ids are known to be of the vocabulary now
    headers |= generation.clamp_note(service, prompts, params.max_tokens)
    if body.stream:
        return EventStream(service, handles, CompletionChunks(style, handles), headers, answer_id)
    found = await outputs(service, handles, request.receive)
    return json_reply(whole(style, found), headers)


def _params(body: CompletionRequest, service: Service) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # the engine generates at least one token; it is not shown
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = body.logprobs if prompt_logprobs is None else max(prompt_logprobs, body.logprobs)
    return sampling_params(
        body, service, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
    )


def _prepare(given: list[str | list[int]], body: CompletionRequest, service: Service) -> list[Prepared]:
    special = body.add_special_tokens is not False
    prompts = []
    for prompt in given:
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            ids = generation.tokenize(service, prompt, add_special_tokens=special)
        else:
            ids = prompt
        prompts.append(Prepared(text, generation.truncated(ids, body, service, body.max_tokens)))
    return prompts


def _style(
    service: Service, body: CompletionRequest, answer_id: str, model: str, n: int, prompts: list[Prepared]
) -> CompletionStyle:
    options, settings = body.stream_options, service.settings
    return CompletionStyle(
        answer_id=answer_id,
        created=generation.now(),
        model=model,
        fingerprint=service.fingerprint,
        n=n,
        prompts=prompts,
        tokenizer=service.engine.tokenizer,
        echo=bool(body.echo),
        echo_text=[_echo(service, prompt) for prompt in prompts] if body.echo else (),
        tokens_hidden=bool(body.echo) and body.max_tokens == 0,
        logprobs=body.logprobs is not None,
        show_prompt_logprobs=body.prompt_logprobs is not None,
        as_ids=bool(body.return_tokens_as_token_ids or settings.return_tokens_as_token_ids),
        token_ids=bool(body.return_token_ids),
        include_usage=settings.force_include_usage or bool(options and options.include_usage),
        continuous_usage=settings.force_include_usage
        or bool(options and options.include_usage and options.continuous_usage_stats),
    )


def _echo(service: Service, prompt: Prepared) -> str:
    if prompt.text is not None:
        return prompt.text
    tokenizer = service.engine.tokenizer
    return "" if tokenizer is None else tokenizer.decode(prompt.ids)
