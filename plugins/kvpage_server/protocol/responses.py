"""/v1/responses, the stateless part: request and answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from kvpage_server.protocol.base import Integer, Integers, Mappings, PromptBody, Strings, limits


class ResponsesRequest(PromptBody):
    """The body of POST /v1/responses."""

    input: str | Mappings
    instructions: str | None = None
    max_output_tokens: Integer | None = limits(minimum=1)
    temperature: float | None = limits(minimum=0, maximum=2)
    top_p: float | None = limits(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = limits(minimum=-1)
    min_p: float | None = limits(minimum=0, maximum=1)
    repetition_penalty: float | None = limits(exclusiveMinimum=0)
    presence_penalty: float | None = limits(minimum=-2, maximum=2)
    frequency_penalty: float | None = limits(minimum=-2, maximum=2)
    seed: Integer | None = None
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = limits(minimum=0)
    logits_processors: Strings | None = None
    vllm_xargs: dict[str, Any] | None = None
    tools: Mappings | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Integer | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: Strings | None = None
    top_logprobs: Integer | None = limits(minimum=0, maximum=0)
    truncation: str | None = limits(enum=["disabled", None])
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    store: bool | None = limits(enum=[False, None])
    background: bool | None = limits(enum=[False, None])
    previous_response_id: str | None = limits(enum=[None])
    conversation: Any = None
    prompt: Any = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class InputTokensDetails(BaseModel):
    """Part of ``ResponseUsage``."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Part of ``ResponseUsage``."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens that the request took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(BaseModel):
    """The answer to POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    background: bool
    error: None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any] | None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    user: str | None
