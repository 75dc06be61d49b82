"""A request's sampling fields as SamplingParams; what this server cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from kvpage import RequestError, SamplingParams
from kvpage_server.errors import ApiError, bad_request
from kvpage_server.protocol.base import INT64, GenerationBody, RequestBody, StreamOptions
from kvpage_server.service import Service
from kvpage_server.settings import ServerSettings

PASSED_ON = (
    "n", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "allowed_token_ids", "bad_words",
    "logits_processors", "skip_special_tokens", "spaces_between_special_tokens", "timeout",
)  # fmt: skip
"""Fields that SamplingParams takes by the same name and checks."""

REFUSED: Mapping[str, str] = {
    "suffix": "this model does not fill in the middle: leave it out",
    "structured_outputs": "structured output has not landed yet: leave it out",
    "prompt_embeds": "prompts are text or token ids",
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "guided_json": "structured output has not landed yet: leave it out",
    "guided_regex": "structured output has not landed yet: leave it out",
    "guided_choice": "structured output has not landed yet: leave it out",
    "guided_grammar": "structured output has not landed yet: leave it out",
    "use_beam_search": "beam search has not landed yet: leave it out",
    "kv_transfer_params": "KV connectors have not landed yet: leave it out",
    "thinking_token_budget": "it has not landed yet: use max_tokens",
    "repetition_detection": "it has not landed yet: use repetition_penalty",
    "watermarking": "it has not landed yet: leave it out",
    "logprob_token_ids": "it has not landed yet: use logprobs",
}
"""Field -> reason. Only a value that asks for something is refused: null and false are not."""

WITHOUT_EFFECT = ("user", "session_id", "length_penalty", "stream_interval")
LOWEST_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
IGNORED_HEADER = "x-kvpage-ignored-fields"
SHOWN_NAMES = 20
MOST_ENTRIES: Mapping[str, int] = {
    "logit_bias": 2**18, "allowed_token_ids": 2**18, "stop_token_ids": 2**18,  # more than any vocabulary has
    "bad_words": 1024, "logits_processors": 64,
}  # fmt: skip
MAX_TEXT = 4096
"""Characters of a stop string or a bad word."""


def ignored_header(body: RequestBody, settings: ServerSettings, *more: str) -> dict[str, str]:
    """The header that names what the request said to no effect.

    Raises:
        ApiError: 400 with ``strict_fields``, for fields that are not known at all.
    """
    unknown = list(islice(body.model_extra or (), SHOWN_NAMES))
    if unknown and settings.strict_fields:
        raise bad_request(f"unknown field {unknown[0]!r:.100}", unknown[0][:100])
    known = [name for name in WITHOUT_EFFECT if getattr(body, name, None) is not None]
    options = getattr(body, "stream_options", None)
    if isinstance(options, StreamOptions):
        known += [f"stream_options.{name}" for name in islice(options.model_extra or (), SHOWN_NAMES)]
    names = ["".join(filter(_plain, name[:64])) for name in (*known, *more, *unknown)[:SHOWN_NAMES]]
    return {IGNORED_HEADER: ",".join(names)} if names else {}


def refuse_unsupported(body: GenerationBody) -> None:
    """Raises ApiError for a field that asks for what this server cannot do."""
    for name, reason in REFUSED.items():
        if getattr(body, name, None) not in (None, False):
            raise bad_request(f"{name} is not supported: {reason}", name)
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        raise bad_request(
            f"response_format {wanted.type[:40]!r} is not supported: structured output has not landed yet; leave it "
            "out, or give {'type': 'text'}",
            "response_format",
        )


def sampling_params(
    body: GenerationBody,
    service: Service,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    **more: Any,
) -> SamplingParams:
    """What the engine is asked for.

    Raises:
        ApiError: 400, a value is out of range; ``param`` names the field.
    """
    settings = service.settings
    _check_limits(body, service, max_tokens)
    values = {name: getattr(body, name) for name in PASSED_ON if getattr(body, name) is not None}
    if body.temperature is not None:
        values["temperature"] = (
            LOWEST_TEMPERATURE if 0 < body.temperature < LOWEST_TEMPERATURE else body.temperature
        )
    if body.seed is not None and body.seed != -1:
        values["seed"] = _in_range("seed", body.seed, *INT64) % 2**64
    if body.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): value for key, value in body.logit_bias.items()}
    if body.vllm_xargs is not None:
        values["extra_args"] = body.vllm_xargs
    if values.get("n", 1) > settings.max_choices:
        raise bad_request(_with_value(f"n must be at most {settings.max_choices}", "n", values["n"]), "n")
    values.update(more)
    try:
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **values
        )
    except RequestError as error:
        raise _named(error, body) from None


def _check_limits(body: GenerationBody, service: Service, max_tokens: int | None) -> None:
    """What the server limits and the engine does not."""
    settings = service.settings
    if body.temperature is not None and body.temperature > MAX_TEMPERATURE:
        text = f"temperature must be at most {MAX_TEMPERATURE:g}"
        raise bad_request(_with_value(text, "temperature", body.temperature), "temperature")
    if isinstance(body.stop, list) and len(body.stop) > settings.max_stops:
        raise bad_request(f"stop takes at most {settings.max_stops} strings, got {len(body.stop)}", "stop")
    _check_sizes(body)
    if max_tokens is not None and max_tokens > service.max_model_len:
        raise bad_request(
            f"max_tokens={max_tokens} cannot be greater than max_model_len={service.max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
        )
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("prompt_logprobs cannot be streamed: set stream to false", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")


def _check_sizes(body: GenerationBody) -> None:
    """Each entry costs time in every step, and a body has room for millions."""
    for name, limit in MOST_ENTRIES.items():
        size = len(getattr(body, name) or ())
        if size > limit:
            raise bad_request(f"{name} takes at most {limit} entries, got {size}", name)
    for name, texts in {"stop": body.stop, "bad_words": body.bad_words}.items():
        for text in [texts] if isinstance(texts, str) else texts or ():
            if len(text) > MAX_TEXT:
                raise bad_request(
                    f"{name} takes texts of at most {MAX_TEXT} characters, got {len(text)}", name
                )


def _named(error: RequestError, body: GenerationBody) -> ApiError:
    """The error with the field and the value that the client sent."""
    name = error.param
    value = getattr(body, name, None) if name else None
    if name is None or isinstance(value, (dict, list)) or value is None:
        return bad_request(str(error), name)
    return bad_request(_with_value(str(error), name, value), name)


def _with_value(message: str, name: str, value: object) -> str:
    return f"{message} (parameter={name}, value={str(value)[:100]})"


def _in_range(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise bad_request(_with_value(f"{name} must be between {low} and {high}", name, value), name)
    return value


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 10:
        raise bad_request(f"the keys of logit_bias must be token ids, got {key[:40]!r}", "logit_bias")
    return int(key)


def _plain(letter: str) -> bool:
    return letter.isascii() and (letter.isalnum() or letter in "_.-")
