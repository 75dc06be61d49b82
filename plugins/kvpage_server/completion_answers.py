"""Answers of /v1/completions: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpage import RequestOutput, TokenEvent
from kvpage_server.generation import Prepared, usage, usage_of
from kvpage_server.logprobs import CompletionLogprobs, TokenTexts, prompt_logprobs
from kvpage_server.streams import dumps


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionStyle:
    """What a request wants its answer to look like.

    Attributes:
        tokens_hidden: max_tokens=0: the one token that was generated is not shown.
        echo: the prompt stands before the answer, and its tokens before the answer's.
        echo_text: texts of the prompts, where ``echo`` is set.
        logprobs: tokens' log-probabilities are reported.
        include_usage, continuous_usage: of a stream: usage at its end, usage in each chunk.
    """

    answer_id: str
    created: int
    model: str
    fingerprint: str
    n: int
    prompts: Sequence[Prepared]
    tokenizer: TokenTexts | None
    echo: bool
    echo_text: Sequence[str]
    tokens_hidden: bool
    logprobs: bool
    show_prompt_logprobs: bool
    as_ids: bool
    token_ids: bool
    include_usage: bool
    continuous_usage: bool

    def head(self) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


def whole(style: CompletionStyle, found: Sequence[RequestOutput]) -> dict[str, Any]:
    """The answer of a request that is not streamed."""
    choices = [
        _choice(style, prompt, index, output)
        for prompt, output in enumerate(found)
        for index in range(style.n)
    ]
    return {
        **style.head(),
        "choices": choices,
        "usage": usage_of(found, hidden_tokens=style.tokens_hidden),
        "system_fingerprint": style.fingerprint,
        "service_tier": None,
    }


def _choice(style: CompletionStyle, prompt: int, index: int, output: RequestOutput) -> dict[str, Any]:
    choice = output.outputs[index]
    hidden = style.tokens_hidden
    ids: list[int] = [] if hidden else list(choice.token_ids)
    positions: list[Any] = [] if hidden else list(choice.logprobs or ())
    text = "" if hidden else choice.text
    answer: dict[str, Any] = {
        "index": prompt * style.n + index,
        "text": (style.echo_text[prompt] + text) if style.echo else text,
        "logprobs": None,
        "finish_reason": "length" if hidden else choice.finish_reason,
        "stop_reason": None if hidden else choice.stop_reason,
        "prompt_logprobs": prompt_logprobs(output.prompt_logprobs) if style.show_prompt_logprobs else None,
    }
    if style.logprobs:
        if style.echo:
            ids = [*output.prompt_token_ids, *ids]
            positions = [*(output.prompt_logprobs or ()), *positions]
        answer["logprobs"] = CompletionLogprobs(style.tokenizer, as_ids=style.as_ids).block(ids, positions)
    if style.token_ids:
        answer["token_ids"] = [] if hidden else list(choice.token_ids)
        answer["prompt_token_ids"] = list(output.prompt_token_ids)
    return answer


class CompletionChunks:
    """A ``ChunkWriter``. The text around a delta is written once a choice."""

    def __init__(self, style: CompletionStyle, handles: Sequence[Any]) -> None:
        self._style = style
        self._handles = handles
        self._head = "data: " + dumps(style.head())[:-1] + ',"choices":['
        count = len(style.prompts) * style.n
        self._prefixes = [f'{self._head}{{"index":{index},"text":' for index in range(count)]
        self._plain = ',"logprobs":null,"finish_reason":null}]}\n\n'
        self._is_plain = not (style.logprobs or style.token_ids or style.continuous_usage)
        self._logprobs = [CompletionLogprobs(style.tokenizer, as_ids=style.as_ids) for _ in range(count)]
        self._begun = [False] * count
        self._generated = 0
        self._quiet_start = style.echo or style.token_ids

    def opening(self) -> bytes:
        """Completions begin with their text."""
        return b""

    def chunk(self, prompt: int, event: TokenEvent) -> bytes:
        """One event; "" where there is nothing to say yet."""
        index = prompt * self._style.n + event.index
        if (
            event.finish_reason is None
            and self._is_plain
            and not (self._quiet_start or self._style.tokens_hidden)
        ):
            self._generated += len(event.token_ids)
            if not event.delta:
                return b""
            return f"{self._prefixes[index]}{dumps(event.delta)}{self._plain}".encode()
        return self._full(prompt, index, event)

    def closing(self) -> bytes:
        """The usage chunk."""
        if not self._style.include_usage:
            return b""
        return f'{self._head}],"usage":{dumps(self._usage())}}}\n\n'.encode()

    def _full(self, prompt: int, index: int, event: TokenEvent) -> bytes:
        style = self._style
        hidden = style.tokens_hidden
        ids: Sequence[int] = () if hidden else event.token_ids
        positions: Sequence[Any] = () if hidden else event.logprobs or ()
        text = "" if hidden else event.delta
        self._generated += len(ids)
        first = not self._begun[index]
        if hidden and event.finish_reason is None:
            return b""
        if not (text or ids or first or event.finish_reason is not None):
            return b""
        self._begun[index] = True
        prompt_ids = style.prompts[prompt].ids
        if first and style.echo:
            text = style.echo_text[prompt] + text
            if style.logprobs:
                ids = [*prompt_ids, *ids]
                positions = [*(self._handles[prompt].output.prompt_logprobs or ()), *positions]
        reason = event.finish_reason
        parts = [self._prefixes[index], dumps(text), ',"logprobs":']
        parts.append(dumps(self._logprobs[index].block(ids, positions)) if style.logprobs else "null")
        parts.append(f',"finish_reason":{dumps("length" if hidden else reason)}')
        if reason is not None:
            parts.append(f',"stop_reason":{dumps(None if hidden else event.stop_reason)}')
        if style.token_ids:
            parts.append(f',"token_ids":{dumps([] if hidden else list(event.token_ids))}')
            if first:
                parts.append(f',"prompt_token_ids":{dumps(list(prompt_ids))}')
        parts.append("}]")
        if style.continuous_usage:
            parts.append(f',"usage":{dumps(self._usage())}')
        parts.append("}\n\n")
        return "".join(parts).encode()

    def _usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(prompt.ids) for prompt in self._style.prompts)
        cached = sum(handle.output.num_cached_tokens for handle in self._handles)
        return usage(prompt_tokens, self._generated, cached)
