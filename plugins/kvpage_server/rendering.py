"""Conversations of requests other than chat completions, as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kvpage_server.conversations import chat_options
from kvpage_server.errors import bad_request
from kvpage_server.protocol.chat import ChatRequest
from kvpage_server.service import Service


class Conversation(Protocol):
    """What such a request may say about its conversation."""

    @property
    def messages(self) -> Sequence[Mapping[str, Any]] | None: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any] | None: ...


def render(
    service: Service,
    body: Conversation,
    *,
    open_turn: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt that a chat completion of these messages would have.

    Args:
        open_turn: ``add_generation_prompt``, where the request does not say.

    Raises:
        ApiError, RequestError: the messages are malformed, or ask for what is not allowed.
    """
    if not body.messages:
        raise bad_request("messages is empty: give at least one message", "messages")
    opened = body.add_generation_prompt
    if opened is None:
        opened = open_turn and not body.continue_final_message
    chat = ChatRequest(
        messages=[dict(message) for message in body.messages],
        tools=None if tools is None else [dict(tool) for tool in tools],
        add_generation_prompt=opened,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=None if body.chat_template_kwargs is None else dict(body.chat_template_kwargs),
    )
    options, _ = chat_options(service, chat)
    return service.engine.render_chat(options.pop("messages"), **options)
