"""/v1/completions: request and answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from kvpage_server.protocol.base import GenerationBody, Integer, Prompts, Usage, limits


class CompletionRequest(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: Prompts = None
    suffix: str | None = None
    logprobs: Integer | None = limits(minimum=-1)


class CompletionLogprobs(BaseModel):
    """One entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n answers to one of the prompts: ``index`` = prompt * n + choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """The answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: None
