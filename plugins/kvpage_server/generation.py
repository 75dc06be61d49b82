"""From a checked request to requests in the engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from kvpage import SamplingParams
from kvpage_server.errors import bad_request
from kvpage_server.protocol.base import INT64, MAX_SALT, PromptBody
from kvpage_server.service import Service

PRIORITY_HEADERS = ("x-kvpage-priority", "x-vllm-priority")
SALT_MUST_NOT_HOLD = "@/\\\0"
PIECE = 16 * 1024
"""Characters that are tokenized in one go; a few hundredths of a second."""
CLAMPED = "x-kvpage-max-tokens-clamped"


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt: its text, where there is one, and its token ids."""

    text: str | None
    ids: list[int]


def tokenize(service: Service, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text.

    Raises:
        ApiError, RequestError: it is empty, or there is no tokenizer.
    """
    if not text:
        raise bad_request("the prompt is empty: give at least one character or token", "prompt")
    if service.engine.tokenizer is None:
        raise bad_request("this server has no tokenizer: give the prompt as token ids", "prompt")
    check_length(service, text, 2 * service.max_model_len)
    return service.engine.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def check_length(service: Service, text: str, most: int) -> None:
    """Raises ApiError for a text of far too many tokens, before all of it is tokenized.

    Encoding holds the interpreter's lock, and of 16 MB does so for half a minute; in pieces, others get their turn.
    The pieces of a text may have a few more tokens than the whole has: hence twice the context in ``most``.
    """
    tokenizer = service.engine.tokenizer
    if tokenizer is None or len(text) <= PIECE:
        return
    tokens = 0
    for start in range(0, len(text), PIECE):
        tokens += len(tokenizer.encode(text[start : start + PIECE], add_special_tokens=False))
        if tokens > most:
            raise bad_request(
                f"This model's maximum context length is {service.max_model_len} tokens. However, the first "
                f"{start + PIECE} of {len(text)} characters alone are some {tokens} tokens: send less text at once.",
                "input_tokens",
            )


def truncated(ids: list[int], body: PromptBody, service: Service, max_tokens: int | None) -> list[int]:
    """``truncate_prompt_tokens`` and ``truncation_side``; -1 = as many as leave room for ``max_tokens``."""
    keep, side = body.truncate_prompt_tokens, body.truncation_side
    if keep is None and len(ids) > service.max_model_len:
        raise bad_request(
            f"This model's maximum context length is {service.max_model_len} tokens. However, your prompt contains "
            f"{len(ids)} input tokens. Shorten it, or set truncate_prompt_tokens.",
            "input_tokens",
        )
    if side not in (None, "left", "right"):
        raise bad_request(f"truncation_side must be 'left' or 'right', got {side!r:.40}", "truncation_side")
    if keep is None:
        return ids
    if keep < -1 or keep == 0:
        raise bad_request(
            f"truncate_prompt_tokens must be -1 or at least 1, got {keep}", "truncate_prompt_tokens"
        )
    if keep == -1:
        keep = max(1, service.max_model_len - (max_tokens or 1))
    if len(ids) <= keep:
        return ids
    return ids[:keep] if side == "right" else ids[-keep:]


def priority_of(request: Request, body: PromptBody, service: Service) -> int:
    """The body's, else a header's."""
    priority = body.priority
    for name in PRIORITY_HEADERS:
        text = request.headers.get(name)
        if priority is None and text is not None:
            if not text.strip().lstrip("-").isdecimal() or len(text) > 20:
                raise bad_request(f"the header {name} must be an integer, got {text[:40]!r}", "priority")
            priority = int(text)
    if not priority:
        return 0
    if not INT64[0] <= priority <= INT64[1]:
        raise bad_request("priority must fit in 64 bits", "priority")
    if service.engine.options.scheduling_policy == "fcfs":
        raise bad_request(
            f"priority={priority} needs a server that was started with --scheduling-policy priority",
            "priority",
        )
    return priority


def salt_of(body: PromptBody) -> str | None:
    """``cache_salt``, checked."""
    salt = body.cache_salt
    if salt is None:
        return None
    if not 0 < len(salt) <= MAX_SALT or any(letter in salt for letter in SALT_MUST_NOT_HOLD):
        raise bad_request(
            f"cache_salt must have 1 to {MAX_SALT} characters, none of them @, /, \\ or NUL", "cache_salt"
        )
    if not salt.isprintable():
        raise bad_request("cache_salt must be printable text", "cache_salt")
    return salt


def submit(
    service: Service,
    prompts: Sequence[Prepared],
    params: SamplingParams,
    *,
    answer_id: str,
    priority: int,
    cache_salt: str | None,
) -> list[Any]:
    """One engine request a prompt (AsyncHandle); all, or none.

    Their ids begin with the answer's; the rest makes them unique, since two clients may bring the same id.
    """
    handles: list[Any] = []
    try:
        for index, prompt in enumerate(prompts):
            handles.append(
                service.engine.generate(
                    {"prompt": prompt.text, "prompt_token_ids": prompt.ids},
                    params,
                    request_id=f"{answer_id}-{index}-{secrets.token_hex(4)}",
                    priority=priority,
                    cache_salt=cache_salt,
                )
            )
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    service.open.update(handles)
    return handles


def clamp_note(service: Service, prompts: Sequence[Prepared], max_tokens: int | None) -> dict[str, str]:
    """A header that says how many tokens are left, where the context cuts ``max_tokens``."""
    longest = max(len(prompt.ids) for prompt in prompts)
    room = service.max_model_len - longest
    return {CLAMPED: str(room)} if max_tokens is not None and 0 < room < max_tokens else {}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """``usage`` of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(found: Sequence[Any], *, hidden_tokens: bool = False) -> dict[str, Any]:
    """``usage`` over whole outputs. ``hidden_tokens``: those of max_tokens=0, which do not count."""
    generated = 0 if hidden_tokens else sum(len(c.token_ids) for o in found for c in o.outputs)
    return usage(
        sum(len(output.prompt_token_ids) for output in found),
        generated,
        sum(output.num_cached_tokens for output in found),
    )


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
