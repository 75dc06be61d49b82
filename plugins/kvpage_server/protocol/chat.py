"""/v1/chat/completions: request and answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from kvpage_server.protocol.base import GenerationBody, Integer, Mappings, Usage, limits


class ChatRequest(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: Mappings = Field(json_schema_extra={"minItems": 1})
    max_completion_tokens: Integer | None = limits(minimum=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = limits(minimum=0)
    tools: Mappings | None = limits(minItems=1)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Mappings | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None
    functions: Any = None
    function_call: Any = None


class FunctionCall(BaseModel):
    """Part of ``ToolCallBody``; ``arguments`` is JSON text."""

    name: str
    arguments: str


class ToolCallBody(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: str
    content: str | None
    refusal: None
    annotations: None
    audio: None
    function_call: None
    reasoning: str | None
    tool_calls: list[ToolCallBody] | None = None


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprob]


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
