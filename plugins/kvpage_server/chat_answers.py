"""Answers of /v1/chat/completions: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvpage import RequestOutput, TokenEvent
from kvpage_server.generation import Prepared, usage, usage_of
from kvpage_server.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from kvpage_server.streams import dumps
from kvpage_server.tools.choice import ToolPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatStyle:
    """What a request wants its answer to look like.

    Attributes:
        echo: what stands before the answer: the last message, where the request asked for it.
        top_logprobs: ``None`` = no log-probabilities.
        tools: how calls are found in the text.
        include_usage, continuous_usage: of a stream: usage at its end, usage in each chunk.
    """

    answer_id: str
    created: int
    model: str
    fingerprint: str
    role: str
    n: int
    prompt: Prepared
    tokenizer: TokenTexts | None
    echo: str
    top_logprobs: int | None
    show_prompt_logprobs: bool
    as_ids: bool
    token_ids: bool
    prompt_text: bool
    tools: ToolPlan
    include_usage: bool
    continuous_usage: bool

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}

    def logprobs(self, ids: Sequence[int], positions: Sequence[Any] | None) -> dict[str, Any] | None:
        """``logprobs`` of a choice or a chunk."""
        if self.top_logprobs is None:
            return None
        content = chat_logprobs(ids, positions or (), self.top_logprobs, self.tokenizer, as_ids=self.as_ids)
        return {"content": content}


def whole(style: ChatStyle, output: RequestOutput) -> dict[str, Any]:
    """The answer of a request that is not streamed."""
    answer = {
        **style.head("chat.completion"),
        "choices": [_choice(style, output, index) for index in range(style.n)],
        "usage": usage_of([output]),
        "system_fingerprint": style.fingerprint,
        "service_tier": None,
    }
    if style.show_prompt_logprobs:
        answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    if style.token_ids:
        answer["prompt_token_ids"] = list(output.prompt_token_ids)
    if style.prompt_text:
        answer["prompt_text"] = style.prompt.text
    return answer


def _choice(style: ChatStyle, output: RequestOutput, index: int) -> dict[str, Any]:
    choice = output.outputs[index]
    reason: str | None = choice.finish_reason
    content, calls = choice.text, list[dict[str, Any]]()
    if style.tools.factory is not None:
        reader = style.tools.reader()
        content, calls = reader.whole(choice.text)
        reason = reader.finish_reason(reason)
    message: dict[str, Any] = {
        "role": style.role,
        "content": None if calls and not content and not style.echo else style.echo + content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    if calls:
        message["tool_calls"] = calls
    answer = {
        "index": index,
        "message": message,
        "logprobs": style.logprobs(choice.token_ids, choice.logprobs),
        "finish_reason": reason,
        "stop_reason": choice.stop_reason,
    }
    if style.token_ids:
        answer["token_ids"] = list(choice.token_ids)
    return answer


class ChatChunks:
    """A ``ChunkWriter``. The text around a delta is written once a choice."""

    def __init__(self, style: ChatStyle, handle: Any) -> None:
        self._style, self._handle = style, handle
        self._head = "data: " + dumps(style.head("chat.completion.chunk"))[:-1] + ',"choices":['
        self._starts = [f'{self._head}{{"index":{index},"delta":' for index in range(style.n)]
        self._contents = [start + '{"content":' for start in self._starts]
        self._plain = '},"logprobs":null,"finish_reason":null}]}\n\n'
        self._is_plain = (
            style.top_logprobs is None
            and style.tools.factory is None
            and not (style.token_ids or style.continuous_usage)
        )
        self._readers = [style.tools.reader() for _ in range(style.n if style.tools.factory else 0)]
        self._generated = 0

    def opening(self) -> bytes:
        """The role chunk of each choice, and what is echoed."""
        style = self._style
        chunks = []
        for index in range(style.n):
            more: dict[str, Any] = {}
            if style.token_ids and index == 0:
                more["prompt_token_ids"] = list(style.prompt.ids)
            delta: dict[str, Any] = {"role": style.role, "content": ""}
            chunks.append(self._chunk(index, delta, top=more))
            if style.echo:
                chunks.append(self._chunk(index, {"content": style.echo}))
        return "".join(chunks).encode()

    def chunk(self, prompt: int, event: TokenEvent) -> bytes:
        """One event; "" where there is nothing to say yet."""
        self._generated += len(event.token_ids)
        if event.finish_reason is None and self._is_plain:
            if not event.delta:
                return b""
            return f"{self._contents[event.index]}{dumps(event.delta)}{self._plain}".encode()
        return self._full(event)

    def closing(self) -> bytes:
        """The usage chunk."""
        if not self._style.include_usage:
            return b""
        return f'{self._head}],"usage":{dumps(self._usage())}}}\n\n'.encode()

    def _full(self, event: TokenEvent) -> bytes:
        style, index = self._style, event.index
        deltas = self._deltas(event)
        more: dict[str, Any] = {}
        if style.top_logprobs is not None and event.token_ids:
            more["logprobs"] = style.logprobs(event.token_ids, event.logprobs)
        if style.token_ids and event.token_ids:
            more["token_ids"] = list(event.token_ids)
        if event.finish_reason is not None:
            reason: str | None = event.finish_reason
            more["finish_reason"] = self._readers[index].finish_reason(reason) if self._readers else reason
            more["stop_reason"] = event.stop_reason
        if not deltas and not more:
            return b""
        # All but the last delta go alone; what is said of the tokens goes with the last.
        *first, last = deltas or [{} if event.finish_reason is not None else {"content": ""}]
        chunks = [self._chunk(index, delta) for delta in first]
        top = {}
        if event.finish_reason is not None and not style.include_usage:
            top["system_fingerprint"] = style.fingerprint
        chunks.append(self._chunk(index, last, more, top))
        return "".join(chunks).encode()

    def _deltas(self, event: TokenEvent) -> list[dict[str, Any]]:
        if not self._readers:
            return [{"content": event.delta}] if event.delta else []
        reader = self._readers[event.index]
        gained = reader.feed(event.delta) if event.delta else []
        return gained if event.finish_reason is None else [*gained, *reader.finish()]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        more: dict[str, Any] | None = None,
        top: dict[str, Any] | None = None,
    ) -> str:
        entries = {"logprobs": None, "finish_reason": None, **(more or {})}
        parts = [self._starts[index], dumps(delta), ",", dumps(entries)[1:], "]"]
        if top:
            parts.append("," + dumps(top)[1:-1])
        if self._style.continuous_usage:
            parts.append(f',"usage":{dumps(self._usage())}')
        parts.append("}\n\n")
        return "".join(parts)

    def _usage(self) -> dict[str, Any]:
        cached = self._handle.output.num_cached_tokens
        return usage(len(self._style.prompt.ids), self._generated, cached)
