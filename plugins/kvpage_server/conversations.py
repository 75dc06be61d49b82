"""What a chat request tells the chat template, and what it may not."""

from __future__ import annotations

from typing import Any

from kvpage_server.errors import bad_request
from kvpage_server.protocol.chat import ChatRequest
from kvpage_server.service import Service

RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
     "self", "conversation", "tokenize", "template_options"}
)  # fmt: skip
"""What chat_template_kwargs may not set: the request has fields of its own for these, which are checked."""


def chat_options(service: Service, body: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """Arguments of ``AsyncEngine.render_chat`` ("messages" among them), and the fields that have no effect.

    Raises:
        ApiError: 400, the request asks for a template of its own, or there is none at all.
    """
    options: dict[str, Any] = dict(body.chat_template_kwargs or {})
    taken = sorted(RESERVED & set(options))
    if taken:
        raise bad_request(
            f"chat_template_kwargs cannot set {taken[0]!r}: use the request's own field",
            "chat_template_kwargs",
        )
    if body.chat_template is not None:
        if not service.settings.trust_request_chat_template:
            raise bad_request(
                "chat_template in a request is not allowed here: leave it out, or start the server with "
                "--trust-request-chat-template",
                "chat_template",
            )
        options["chat_template"] = body.chat_template
    source = body.chat_template or template_source(service)
    if source is None:
        raise bad_request(
            "the model has no chat template: start the server with --chat-template FILE, or use /v1/completions",
            "messages",
        )
    unused = []
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
        unused += ["reasoning_effort"] if "reasoning_effort" not in source else []
    if body.include_reasoning is False:
        unused.append("include_reasoning")
    if body.documents is not None:
        options["documents"] = body.documents
        unused += ["documents"] if "documents" not in source else []
    if body.tools:
        options["tools"] = body.tools
    options["messages"] = [_without_nulls(message) for message in body.messages]
    options["continue_final_message"] = bool(body.continue_final_message)
    options["add_generation_prompt"] = body.add_generation_prompt is not False
    if body.add_generation_prompt is None and body.continue_final_message:
        options["add_generation_prompt"] = False
    return options, unused


def template_source(service: Service) -> str | None:
    """The text of the template that plain conversations are written by."""
    given = service.engine.options.chat_template
    tokenizer = service.engine.tokenizer
    if given is not None or tokenizer is None:
        return given
    return tokenizer.chat_template


def last_text(body: ChatRequest) -> tuple[str, str]:
    """(role, text) of the last message; its text is "" where it has none."""
    last = body.messages[-1] if body.messages else {}
    role, content = last.get("role"), last.get("content")
    return (role if isinstance(role, str) else "assistant"), (content if isinstance(content, str) else "")


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Clients send an answer back as they dumped it, ``tool_calls: null`` and all; templates ask what is there."""
    return {name: value for name, value in message.items() if value is not None or name == "content"}
