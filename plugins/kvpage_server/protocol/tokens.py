"""/tokenize, /detokenize, /tokenizer_info: requests and answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from kvpage_server.protocol.base import Integers, Mappings, RequestBody


class TokenizeRequest(RequestBody):
    """The body of POST /tokenize: a ``prompt``, or a conversation in ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Mappings | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Mappings | None = None


class TokenizeResponse(BaseModel):
    """The answer to POST /tokenize; ``token_strs`` where the request asked for them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Integers


class DetokenizeResponse(BaseModel):
    """The answer to POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The answer to GET /tokenizer_info: what a client needs to count and render by itself."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    vocab_size: int
    chat_template: str | None
