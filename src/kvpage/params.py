"""What a request wants: tokens (SamplingParams), or its prompt as one vector (PoolingParams)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from kvpage.errors import RequestError

MAX_SEED = 2**64 - 1
MAX_CHOICES = 16384

Pooling: TypeAlias = Literal["mean", "last"]
"""Which hidden states make the vector of a prompt: the mean over all positions, or that of the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request. Frozen; validated once, when made.

    A field left at ``None`` takes the model's ``generation_config.json`` value where it has one, else the
    neutral value named below. Names and ranges follow vLLM and the OpenAI API.

    Attributes:
        n: number of choices, each a sequence of its own that shares the prompt's KV blocks.
        max_tokens: most new tokens a choice; ``None`` = as many as the context and the KV pool hold.
        min_tokens: EOS, stop token ids and stop strings do not count before this many tokens.
        temperature: 0 = greedy; neutral 1.0.
        top_k: keep the k most likely tokens; 0 or -1 = all.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
        repetition_penalty: > 0; divides positive and multiplies negative logits of every token seen in prompt
            or output (CTRL, arXiv:1909.05858).
        presence_penalty: in [-2, 2]; subtracted once from the logit of every token that the output holds.
        frequency_penalty: in [-2, 2]; subtracted from the logit of a token as often as the output holds it.
        logit_bias: token id -> added to its logit, clamped to [-100, 100].
        allowed_token_ids: if given, no other token may be chosen.
        bad_words: strings that must not appear in the output.
        stop: strings that end a choice; the text is cut before the match.
        include_stop_str_in_output: cut after the match instead.
        stop_token_ids: token ids that end a choice.
        ignore_eos: go on after the model's end-of-sequence token.
        seed: 0 .. 2**64 - 1 makes a request repeatable whatever runs beside it; ``None`` or -1 = fresh
            entropy.
        timeout: seconds from submission; then the request ends with finish_reason "length", stop_reason
            "timeout", and what was generated so far.
        logprobs: report the chosen token's log-probability and those of this many top tokens; -1 = all.
        prompt_logprobs: the same for every prompt token.
        detokenize: ``False`` leaves ``text`` empty (stop strings are then refused).
        skip_special_tokens, spaces_between_special_tokens: as in transformers' ``decode``.
        logits_processors: names of registered logits processors to run for this request.
        extra_args: values for those processors and for other plugins, passed on unread.

    Raises:
        RequestError: a value is out of range or two contradict each other; ``param`` names the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    timeout: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: Sequence[str] = ()
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._normalise()
        _integer("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("timeout", self.timeout, 0.0, None, open_low=True)
        if self.top_k is not None:
            _integer("top_k", self.top_k, -1, None)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), -1, None)
        self._check_collections()
        self._check_contradictions()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; validated again."""
        return replace(self, **changes)

    def with_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Fields still at ``None`` filled from ``defaults`` (generation_config.json names), then neutral values."""
        filled: dict[str, Any] = {}
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) is None:
                value = defaults.get(name)
                filled[name] = neutral if value is None else value
        return replace(self, **filled)

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != _default(f)
        ]
        return f"SamplingParams({', '.join(changed)})"

    def _normalise(self) -> None:
        put = object.__setattr__
        if isinstance(self.stop, str):
            put(self, "stop", (self.stop,))
        for name in ("stop", "bad_words", "stop_token_ids", "logits_processors", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None and name != "allowed_token_ids":
                value = ()
            if isinstance(value, str) or (value is not None and not isinstance(value, Sequence)):
                raise RequestError(f"{name} must be a list, got {value!r}", param=name)
            put(self, name, None if value is None else tuple(value))
        if self.seed == -1:
            put(self, "seed", None)

    def _check_collections(self) -> None:
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text:
                    raise RequestError(
                        f"{name} must hold non-empty strings, got {text!r}: leave it out", param=name
                    )
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _integer(name, token, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty, so no token could be chosen: give ids or leave it out",
                param="allowed_token_ids",
            )
        for name in self.logits_processors:
            if not isinstance(name, str):
                raise RequestError(
                    f"logits_processors must hold names of registered processors, got {name!r}: register it through "
                    "a plugin (hook kvpage_logits_processors)",
                    param="logits_processors",
                )
        if not isinstance(self.extra_args, Mapping):
            raise RequestError(f"extra_args must be a mapping, got {self.extra_args!r}", param="extra_args")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(
                    f"logit_bias must map token ids to numbers, got {self.logit_bias!r}", param="logit_bias"
                )
            bias = {}
            for token, value in self.logit_bias.items():
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise RequestError(
                        f"the keys of logit_bias must be token ids (integers from 0), got {token!r}",
                        param="logit_bias",
                    )
                _number("logit_bias", value, None, None)
                bias[token] = max(-100.0, min(100.0, float(value)))
            object.__setattr__(self, "logit_bias", bias)

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: "
                "raise max_tokens or lower min_tokens",
                param="min_tokens",
            )
        if self.temperature == 0 and self.n > 1:
            raise RequestError(
                f"n={self.n} with temperature=0 would give {self.n} equal answers: "
                "set n=1 or a temperature above 0",
                param="n",
            )
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop strings need text: set detokenize=True or use stop_token_ids", param="stop"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingParams:
    """How to make one vector of a prompt. Frozen; validated once, when made.

    Attributes:
        pooling: "mean" of the hidden states (after the final norm) of all positions, or that of the "last" one.
        normalize: scale the vector to length 1.
        timeout: seconds from submission; then the request ends in error, for half a prompt has no vector.
        n, max_tokens, min_tokens, prompt_logprobs: what SamplingParams of the same request would say.

    Raises:
        RequestError: a value is out of range; ``param`` names the field.
    """

    n: ClassVar[int] = 1
    max_tokens: ClassVar[int] = 0
    min_tokens: ClassVar[int] = 0
    prompt_logprobs: ClassVar[None] = None
    pooling: Pooling = "mean"
    normalize: bool = True
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise RequestError(f"pooling must be 'mean' or 'last', got {self.pooling!r:.80}", param="pooling")
        if not isinstance(self.normalize, bool):
            raise RequestError(
                f"normalize must be True or False, got {self.normalize!r:.80}", param="normalize"
            )
        _number("timeout", self.timeout, 0.0, None, open_low=True)


Params: TypeAlias = SamplingParams | PoolingParams

NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What ``with_defaults`` gives a field that neither the request nor the model's generation config sets."""


def _default(spec: Any) -> Any:
    return spec.default_factory() if callable(spec.default_factory) else spec.default


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {limit}, got {value}", param=name)


def _number(
    name: str, value: object, low: float | None, high: float | None, *, open_low: bool = False
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise RequestError(f"{name} must be a finite number, got {value!r}", param=name)
    too_low = low is not None and (value <= low if open_low else value < low)
    if too_low or (high is not None and value > high):
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (
            "" if high is None else f" and at most {high:g}"
        )
        raise RequestError(f"{name} must be {bounds}, got {value!r}", param=name)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
