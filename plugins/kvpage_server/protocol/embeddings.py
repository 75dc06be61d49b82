"""/v1/embeddings: request and answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from kvpage_server.protocol.base import Integer, Mappings, PromptBody, Prompts, PromptTokensDetails, limits


class EmbeddingRequest(PromptBody):
    """The body of POST /v1/embeddings: ``input``, or a conversation in ``messages``."""

    input: Prompts = None
    messages: Mappings | None = None
    encoding_format: str | None = limits(enum=["float", "base64", None])
    dimensions: Integer | None = limits(minimum=1)
    normalize: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Embedding(BaseModel):
    """The vector of one input: numbers, or base64 of little-endian 32-bit floats."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None


class EmbeddingResponse(BaseModel):
    """The answer to POST /v1/embeddings."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
