"""Answers of /v1/responses: whole, and as the sequence of events that OpenAI documents."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpage import RequestOutput, TokenEvent
from kvpage_server.generation import Prepared
from kvpage_server.protocol.responses import ResponsesRequest
from kvpage_server.streams import dumps
from kvpage_server.tools.choice import ToolPlan, ToolReader

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseStyle:
    """What does not change while an answer grows."""

    answer_id: str
    created: int
    model: str
    body: ResponsesRequest
    prompt: Prepared
    temperature: float | None
    top_p: float | None
    tools: ToolPlan

    def response(self, status: str, output: Sequence[Item], usage: Mapping[str, Any] | None) -> Item:
        """The response object; status "in_progress", "completed" or "incomplete"."""
        body = self.body
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.answer_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning,
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }

    def usage(self, cached: int, generated: int) -> Item:
        """``usage`` of a response."""
        prompt = len(self.prompt.ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + generated,
        }


def whole(style: ResponseStyle, output: RequestOutput) -> Item:
    """The answer of a request that is not streamed."""
    choice = output.outputs[0]
    text, calls = choice.text, list[Item]()
    if style.tools.factory is not None:
        text, calls = style.tools.reader().whole(choice.text)
    status = _status(choice.finish_reason)
    items = [_message(text, "completed")] if text or not calls else []
    items += [
        _call(call["id"], call["function"]["name"], call["function"]["arguments"], "completed")
        for call in calls
    ]
    items[-1]["status"] = status
    return style.response(status, items, style.usage(output.num_cached_tokens, len(choice.token_ids)))


class ResponseChunks:
    """A ``ChunkWriter``: one item after the other, each opened, grown and closed."""

    def __init__(self, style: ResponseStyle, handle: Any) -> None:
        self._style, self._handle = style, handle
        self._reader: ToolReader | None = None if style.tools.factory is None else style.tools.reader()
        self._items: list[Item] = []
        self._open = False  # the last item may still grow
        self._reason: str | None = None
        self._number = 0
        self._generated = 0

    def opening(self) -> bytes:
        """The response exists, and is being worked on."""
        begun = self._style.response("in_progress", [], None)
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
        ).encode()

    def chunk(self, prompt: int, event: TokenEvent) -> bytes:
        """What one event of the engine's adds."""
        self._generated += len(event.token_ids)
        events = "".join(map(self._grow, self._deltas(event)))
        if event.finish_reason is not None:
            self._reason = event.finish_reason
            if not self._items:
                events += self._begin_message()
            events += self._end_item(_status(self._reason))
        return events.encode()

    def closing(self) -> bytes:
        """The whole response once more."""
        status = _status(self._reason)
        usage = self._style.usage(self._handle.output.num_cached_tokens, self._generated)
        return self._event(
            f"response.{status}", response=self._style.response(status, self._items, usage)
        ).encode()

    def _deltas(self, event: TokenEvent) -> list[Item]:
        if self._reader is None:
            return [{"content": event.delta}] if event.delta else []
        deltas = self._reader.feed(event.delta) if event.delta else []
        return deltas if event.finish_reason is None else [*deltas, *self._reader.finish()]

    def _grow(self, delta: Item) -> str:
        if "content" in delta:
            return self._add_text(delta["content"])
        return "".join(map(self._add_call, delta["tool_calls"]))

    def _add_text(self, text: str) -> str:
        events = ""
        if not self._open or self._items[-1]["type"] != "message":
            events = self._end_item("completed") + self._begin_message()
        item = self._items[-1]
        item["content"][0]["text"] += text
        return events + self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def _add_call(self, call: Item) -> str:
        events, arguments = "", call["function"]["arguments"]
        if "id" in call:
            item = _call(call["id"], call["function"]["name"], "", "in_progress")
            events = self._end_item("completed") + self._begin(item)
        if not arguments:
            return events
        self._items[-1]["arguments"] += arguments
        return events + self._of_item("response.function_call_arguments.delta", delta=arguments)

    def _begin_message(self) -> str:
        item = _message("", "in_progress")
        part = item["content"].pop()
        events = self._begin(item)
        item["content"].append(part)
        return events + self._of_part("response.content_part.added", part=part)

    def _begin(self, item: Item) -> str:
        self._items.append(item)
        self._open = True
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _end_item(self, status: str) -> str:
        """Close the item that is open, if one is."""
        if not self._open:
            return ""
        self._open = False
        item = self._items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            events = self._of_part("response.output_text.done", text=part["text"], logprobs=[])
            events += self._of_part("response.content_part.done", part=part)
        else:
            events = self._of_item(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        item["status"] = status
        return events + self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_part(self, kind: str, **fields: Any) -> str:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        data = dumps({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return f"event: {kind}\ndata: {data}\n\n"


def _message(text: str, status: str) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [part],
    }


def _call(call_id: str, name: str, arguments: str, status: str) -> Item:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _status(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"
