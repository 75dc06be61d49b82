"""What every request body has in common: strict types, ``null`` for whatever is optional, unknown fields kept."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema

MAX_SALT = 128
INT64 = (-(2**63), 2**63 - 1)


def _integral(value: object) -> object:
    """5.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


class _FirstOnly(FailFast):
    """A list of a million wrong entries is one error. Hashable, so that the list may be part of a union."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


Integer = Annotated[int, BeforeValidator(_integral)]
Integers = Annotated[list[Integer], _FirstOnly()]
Strings = Annotated[list[str], _FirstOnly()]
Mappings = Annotated[list[dict[str, Any]], _FirstOnly()]
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
            ]
        }
    ),
]
"""Checked where they are read: a union of long lists would be tried four times over."""


def limits(**schema: Any) -> Any:
    """A field that may be left out or ``null``; ``schema`` documents a limit that is checked further on."""
    return Field(default=None, json_schema_extra=schema)


class RequestBody(BaseModel):
    """A body. Types are strict; a field that is not declared is kept in ``model_extra``, so that it can be named."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(RequestBody):
    """``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(RequestBody):
    """``response_format``: only {"type": "text"} is answered yet."""

    type: str
    json_schema: Any = None


class PromptBody(RequestBody):
    """The fields of every request that brings a prompt."""

    model: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Integer | None = limits(minimum=-1)
    truncation_side: str | None = limits(enum=["left", "right", None])
    priority: Integer | None = limits(minimum=INT64[0], maximum=INT64[1])
    request_id: str | None = None
    cache_salt: str | None = limits(minLength=1, maxLength=MAX_SALT)
    user: str | None = None


class GenerationBody(PromptBody):
    """The fields that completions and chat completions share. ``None`` = the default named in the documentation."""

    max_tokens: Integer | None = limits(minimum=0)
    n: Integer | None = limits(minimum=1, maximum=16384)
    temperature: float | None = limits(minimum=0, maximum=2)
    top_p: float | None = limits(exclusiveMinimum=0, maximum=1)
    top_k: Integer | None = limits(minimum=-1)
    min_p: float | None = limits(minimum=0, maximum=1)
    repetition_penalty: float | None = limits(exclusiveMinimum=0)
    presence_penalty: float | None = limits(minimum=-2, maximum=2)
    frequency_penalty: float | None = limits(minimum=-2, maximum=2)
    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = limits(minimum=0)
    seed: Integer | None = limits(minimum=INT64[0], maximum=INT64[1])
    prompt_logprobs: Integer | None = limits(minimum=-1)
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: Integers | None = None
    bad_words: Strings | None = None
    logits_processors: Strings | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    session_id: str | None = None
    timeout: float | None = limits(exclusiveMinimum=0)
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_interval: Integer | None = limits(minimum=1)
    thinking_token_budget: Integer | None = None
    repetition_detection: Any = None
    watermarking: Any = None
    prompt_embeds: Any = None
    logprob_token_ids: Any = None


class PromptTokensDetails(BaseModel):
    """Part of ``Usage``."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens that a request took: each prompt is counted once, completion tokens over all choices."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ErrorDetail(BaseModel):
    """Part of ``ErrorBody``; ``code`` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """Every error that is answered."""

    error: ErrorDetail
