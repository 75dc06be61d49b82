"""Prompts and parameters as users give them -> Requests the scheduler takes. Everything is checked here, in the
caller's thread, before the engine hears of it."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvpage.engine.request import EmbeddingState, GenerationState
from kvpage.errors import RequestError
from kvpage.params import Pooling, PoolingParams, SamplingParams
from kvpage.sched.sequence import Request
from kvpage.text.chat import ChatTemplate
from kvpage.text.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Mapping[str, Any] | Sequence[int]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": [...]} with an optional "cache_salt"."""

PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLimits:
    """What a request is held to: V, most top logprobs (-1 = any), the model's EOS ids, known processors."""

    vocab_size: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    processors: frozenset[str]


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The template of conversations, and the one of those with tools; ``None`` where there is none."""

    plain: ChatTemplate | None = None
    with_tools: ChatTemplate | None = None

    def render(self, messages: Sequence[Message], template_options: Mapping[str, Any]) -> str:
        """The conversation as its template writes it.

        Raises:
            RequestError: there is no template, or it refuses the conversation.
        """
        template = (self.with_tools if template_options.get("tools") else None) or self.plain
        if template is None:
            raise RequestError(
                "this model has no chat template: give one with chat_template=..., or use generate()",
                param="messages",
            )
        return template.render(messages, **template_options)


class InputProcessor:
    """Makes the states of requests. Safe to call from several threads.

    Args:
        tokenizer: ``None`` if the engine has none. templates: of chats.
        defaults: sampling values of the model's generation_config.json. seed: the engine's, or ``None``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        templates: ChatTemplates,
        limits: InputLimits,
        defaults: Mapping[str, Any],
        seed: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self._templates = templates
        self.limits = limits
        self._defaults = defaults
        self._seed = seed
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> GenerationState:
        """A request that has passed every check that needs no engine state.

        Raises:
            RequestError: prompt or parameters cannot be served; names the field.
        """
        text, token_ids, salt = self._tokenise(prompt)
        return self._state(
            text, token_ids, params, request_id, priority, salt if cache_salt is None else cache_salt
        )

    def embedding(
        self,
        prompt: Prompt,
        *,
        pooling: Pooling,
        normalize: bool,
        timeout: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> EmbeddingState:
        """``request`` for the vector of a prompt."""
        text, token_ids, salt = self._tokenise(prompt)
        salt = salt if cache_salt is None else cache_salt
        params = PoolingParams(pooling=pooling, normalize=normalize, timeout=timeout)
        number = self._number(request_id, priority, salt)
        self._check_tokens(token_ids)
        request = Request(
            request_id=f"request-{number}" if request_id is None else request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=0,
            arrival=time.monotonic(),
            priority=priority,
            cache_salt=salt,
        )
        return EmbeddingState(request, params, text, time.time())

    def chat(self, messages: Sequence[Message], **template_options: Any) -> tuple[str, list[int]]:
        """(text, token ids) of a conversation, by the model's chat template."""
        text = self.render_chat(messages, **template_options)
        return text, self._need_tokenizer().encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Message], *, chat_template: str | None = None, **template_options: Any
    ) -> str:
        """The conversation as the model's chat template writes it, or as ``chat_template`` does."""
        if chat_template is None:
            return self._templates.render(messages, template_options)
        special_tokens = {} if self.tokenizer is None else self.tokenizer.special_tokens
        return ChatTemplate(chat_template, special_tokens).render(messages, **template_options)

    def chat_request(
        self, messages: Sequence[Message], params: SamplingParams | None, *, request_id: str | None = None,
        priority: int = 0, cache_salt: str | None = None, **template_options: Any,
    ) -> GenerationState:  # fmt: skip
        """``request`` for a conversation."""
        text, token_ids = self.chat(messages, **template_options)
        return self._state(text, token_ids, params, request_id, priority, cache_salt)

    def _state(
        self, text: str | None, token_ids: Sequence[int], params: SamplingParams | None, request_id: str | None,
        priority: int, cache_salt: str | None,
    ) -> GenerationState:  # fmt: skip
        _check_type("params", params, SamplingParams)
        number = self._number(request_id, priority, cache_salt)
        full = (params or SamplingParams()).with_defaults(self._defaults)
        self._check_tokens(token_ids)
        self._check(full)
        eos = frozenset(self.limits.eos_token_ids)
        request = Request(
            request_id=f"request-{number}" if request_id is None else request_id,
            prompt_token_ids=token_ids,
            params=full,
            seed=self._seed_for(full, number),
            arrival=time.monotonic(),
            priority=priority,
            cache_salt=cache_salt,
            bad_word_ids=self._bad_words(full),
            stop_token_ids=frozenset(full.stop_token_ids) | (frozenset() if full.ignore_eos else eos),
            eos_token_ids=frozenset() if full.ignore_eos else eos - frozenset(full.stop_token_ids),
        )
        return GenerationState(request, full, text, self.tokenizer, time.time())

    def _number(self, request_id: str | None, priority: int, cache_salt: str | None) -> int:
        """Of a new request, if what any request may say is of the right type."""
        _check_type("request_id", request_id, str)
        _check_type("cache_salt", cache_salt, str)
        if type(priority) is not int:
            raise RequestError(f"priority must be an integer, got {priority!r}", param="priority")
        return next(self._numbers)

    def _tokenise(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        salt = None
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - PROMPT_KEYS)
            if unknown or not ({"prompt", "prompt_token_ids"} & set(prompt)):
                raise RequestError(
                    f"a prompt mapping needs 'prompt' or 'prompt_token_ids' (and may have "
                    f"'cache_salt'), got the keys {sorted(prompt)}",
                    param="prompt",
                )
            salt = prompt.get("cache_salt")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, ids = prompt, None
        else:
            text, ids = None, prompt
        if ids is None:
            if not isinstance(text, str):
                raise RequestError(
                    f"a prompt must be text or token ids, got {type(prompt).__name__}"
                    + (": give its .tolist()" if hasattr(prompt, "tolist") else ""),
                    param="prompt",
                )
            if not text:
                raise RequestError(
                    "the prompt is empty: give at least one character or token", param="prompt"
                )
            return text, self._need_tokenizer().encode(text), salt
        if (
            not isinstance(ids, Sequence)
            or isinstance(ids, (str, bytes, bytearray))
            or any(type(i) is not int for i in ids)
        ):
            raise RequestError(
                f"a prompt must be text or a list of integers, got {ids!r:.80}"
                + (": give its .tolist()" if hasattr(ids, "tolist") else ""),
                param="prompt",
            )
        return text, list(ids), salt

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        limits = self.limits
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one character or token", param="prompt")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= limits.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"token id {wrong} is out of vocabulary: the model has {limits.vocab_size} tokens "
                f"(0 .. {limits.vocab_size - 1})",
                param="prompt",
            )

    def _check(self, params: SamplingParams) -> None:
        limits = self.limits
        named = {"logit_bias": params.logit_bias or (), "allowed_token_ids": params.allowed_token_ids or (),
                 "stop_token_ids": params.stop_token_ids}  # fmt: skip
        for name, ids in named.items():
            for token in ids:
                if token >= limits.vocab_size:
                    raise RequestError(
                        f"{name} holds token id {token}, which is out of vocabulary: the model has "
                        f"{limits.vocab_size} tokens (0 .. {limits.vocab_size - 1})",
                        param=name,
                    )
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and limits.max_logprobs != -1 and not 0 <= asked <= limits.max_logprobs:
                what = "all" if asked == -1 else str(asked)
                raise RequestError(
                    f"{name} asks for {what}, more than max_logprobs={limits.max_logprobs}: ask for "
                    "fewer, or make the engine with a higher max_logprobs (-1 = no limit)",
                    param=name,
                )
        for name in params.logits_processors:
            if name not in limits.processors:
                known = ", ".join(sorted(limits.processors)) or "none"
                raise RequestError(
                    f"logits processor {name!r} is not registered; known: {known}", param="logits_processors"
                )
        for name, instead in (("stop", "stop_token_ids"), ("bad_words", "logit_bias")):
            if getattr(params, name) and self.tokenizer is None:
                raise RequestError(
                    f"{name} needs a tokenizer, and this engine has none: use {instead}", param=name
                )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each bad word as it is written at the start of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            tokenizer = self._need_tokenizer()
            for text in (word, f" {word.lstrip()}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                if ids:
                    found[tuple(ids)] = None
        return [list(ids) for ids in found]

    def _seed_for(self, params: SamplingParams, number: int) -> int:
        if params.seed is not None:
            return params.seed
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little")
        digest = hashlib.blake2b(f"{self._seed}/{number}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "this engine has no tokenizer: give token ids, {'prompt_token_ids': [...]}", param="prompt"
            )
        return self.tokenizer


def _check_type(name: str, value: object, wanted: type) -> None:
    if value is not None and not isinstance(value, wanted):
        raise RequestError(f"{name} must be {wanted.__name__}, got {type(value).__name__}", param=name)
