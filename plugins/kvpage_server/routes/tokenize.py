"""POST /tokenize, POST /detokenize, and GET /tokenizer_info where it is asked for. All of them need the key."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvpage_server import generation
from kvpage_server.body import ERRORS, IN_A_THREAD, documented, read_body
from kvpage_server.conversations import template_source
from kvpage_server.errors import bad_request
from kvpage_server.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from kvpage_server.rendering import render
from kvpage_server.replies import json_reply
from kvpage_server.sampling import ignored_header
from kvpage_server.service import Service

NO_TOKENIZER = "this server has no tokenizer: text and token ids cannot be turned into each other"
MOST_TOKENS = 2**18
"""Tokens of a text, or twice the context if that is more: whoever splits a book does so before."""
MANY_TOKENS = 10_000
"""Token ids from which on decoding would hold up other streams."""


def router(service: Service) -> APIRouter:
    """The routes, bound to a server."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize", **documented(TokenizeRequest, TokenizeResponse))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the chat template writes it."""
        body = await read_body(request, TokenizeRequest)
        service.model_name(body.model)
        headers = ignored_header(body, service.settings)
        if body.messages is not None or len(body.prompt or "") > IN_A_THREAD:
            tokens, texts = await asyncio.to_thread(_encoded, service, body)
        else:
            tokens, texts = _encoded(service, body)
        return json_reply(
            {
                "count": len(tokens),
                "max_model_len": service.max_model_len,
                "tokens": tokens,
                "token_strs": texts,
            },
            headers,
        )

    @routes.post("/detokenize", **documented(DetokenizeRequest, DetokenizeResponse))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        body = await read_body(request, DetokenizeRequest)
        service.model_name(body.model)
        headers = ignored_header(body, service.settings)
        if len(body.tokens) > MANY_TOKENS:
            text = await asyncio.to_thread(_decoded, service, body.tokens)
        else:
            text = _decoded(service, body.tokens)
        return json_reply({"prompt": text}, headers)

    if service.settings.enable_tokenizer_info:

        @routes.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}, **ERRORS})
        async def tokenizer_info() -> Response:
            """What a client needs to count tokens and render conversations by itself."""
            tokenizer = service.engine.tokenizer
            if tokenizer is None:
                raise bad_request(NO_TOKENIZER)
            return json_reply(
                {
                    "tokenizer_class": type(tokenizer).__name__,
                    "vocab_size": tokenizer.vocab_size,
                    "model_max_length": service.max_model_len,
                    **tokenizer.special_tokens,
                    "chat_template": template_source(service),
                }
            )

    return routes


def _encoded(service: Service, body: TokenizeRequest) -> tuple[list[int], list[str] | None]:
    """(token ids, their texts where the request asked for them)."""
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise bad_request(NO_TOKENIZER, "prompt")
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.prompt is not None:
        generation.check_length(service, body.prompt, max(MOST_TOKENS, 2 * service.max_model_len))
        tokens = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        text = render(service, body, open_turn=True, tools=body.tools)
        # The template writes special tokens out itself.
        generation.check_length(service, text, max(MOST_TOKENS, 2 * service.max_model_len))
        tokens = tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    return tokens, [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None


def _decoded(service: Service, tokens: Sequence[int]) -> str:
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise bad_request(NO_TOKENIZER, "tokens")
    wrong = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise bad_request(
            f"token id {str(wrong)[:40]} is out of vocabulary: the tokenizer has {tokenizer.vocab_size} tokens "
            f"(0 .. {tokenizer.vocab_size - 1})",
            "tokens",
        )
    return tokenizer.decode(tokens, skip_special_tokens=False)
