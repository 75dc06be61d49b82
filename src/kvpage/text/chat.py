"""Chat messages to a prompt, by the model's own template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from kvpage.errors import RequestError
from kvpage.text.sandbox import ChatEnvironment, bounded_join, plain_data

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning goes by; templates read the first, some the second."""
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A chat template, compiled once; renders the same text as transformers' ``apply_chat_template``.

    It differs in what servers need: content given as a list of text parts is joined with newlines where the template
    expects strings, and tool call arguments given as JSON text (OpenAI's form) become objects (the templates').
    Templates run in a sandbox that also bounds their work and output. Threads may render at the same time.

    Args:
        source: jinja2 source; ``None`` where the model has no template.
        special_tokens: "bos_token" ... -> text, visible to the template.

    Raises:
        RequestError: no source, or it does not compile (``param="chat_template"``).
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        if not source:
            raise RequestError(
                "the model has no chat template: give one with chat_template=..., or send a prompt instead of messages",
                param="chat_template",
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._environment = ChatEnvironment()
        try:
            self._loops_over_content = loops_over_content(self._environment.parse(source))
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise RequestError(
                f"the chat template does not compile, line {error.lineno}: {error.message}: correct it or give another "
                "with chat_template=...",
                param="chat_template",
            ) from error
        except (RecursionError, ValueError, TypeError, SyntaxError) as error:
            raise RequestError(
                f"the chat template does not compile ({error}): correct it or give another with chat_template=...",
                param="chat_template",
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt text, special tokens written out; encode it with ``add_special_tokens=False``.

        Args:
            messages: at least one; each a mapping with a "role" and usually a "content": text or a list of text
                parts.
            add_generation_prompt: end with the words that open the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            tools: JSON schemas of functions, for templates that show them.
            documents: {"title": ..., "text": ...}, for templates that show them.
            template_kwargs: more variables for the template, e.g. ``enable_thinking=False``; they go before special
                tokens.

        Raises:
            RequestError: messages of the wrong form, or what the template itself objects to.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message leaves the last message open and add_generation_prompt opens a new one: "
                "set one of them to False",
                param="continue_final_message",
            )
        if "messages" in template_kwargs:
            raise RequestError("chat_template_kwargs cannot set 'messages'", param="chat_template_kwargs")
        chat = self._read_messages(messages)
        final = self._open_final(chat) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **plain_data(template_kwargs),
            "messages": chat,
            "tools": _plain_mappings("tools", tools),
            "documents": _plain_mappings("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._run(variables)
        return rendered if final is None else _cut_at_tag(rendered, final)

    def _run(self, variables: Mapping[str, Any]) -> str:
        self._environment.start()
        try:
            return bounded_join(self._template.generate(variables))
        except TemplateError as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise RequestError(
                f"the chat template fails on these messages ({type(error).__name__}: {error}): "
                "check roles and contents, or give another template with chat_template=...",
                param="messages",
            ) from error

    def _read_messages(self, messages: object) -> list[dict[str, Any]]:
        """A checked copy of the messages, in the form that the template expects."""
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            raise RequestError(
                f"messages must be a list of messages, got {type(messages).__name__}", param="messages"
            )
        if not messages:
            raise RequestError("messages is empty: give at least one message", param="messages")
        try:
            chat = plain_data(list(messages))
        except RecursionError as error:
            raise RequestError("messages are nested too deeply", param="messages") from error
        for index, message in enumerate(chat):
            self._read_message(f"messages[{index}]", message)
        return [_with_reasoning(message) for message in chat]

    def _read_message(self, place: str, message: object) -> None:
        if not isinstance(message, dict):
            raise RequestError(
                f"{place} must be a mapping with a role and a content, got {message!r:.80}", param="messages"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"{place}.role must be a string such as 'system', 'user', 'assistant' or 'tool', got {role!r:.80}",
                param="messages",
            )
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            texts = [_part_text(f"{place}.content[{index}]", part) for index, part in enumerate(content)]
            if self._loops_over_content:
                message["content"] = [{"type": "text", "text": text} for text in texts]
            else:
                message["content"] = "\n".join(texts)
        elif content is not None and not isinstance(content, str):
            raise RequestError(
                f"{place}.content must be text or a list of text parts, got {content!r:.80}", param="messages"
            )
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, (list, tuple)) else ():
            _read_arguments(call)

    def _open_final(self, chat: list[dict[str, Any]]) -> str:
        """Mark where the last message ends; returns its text."""
        content = chat[-1].get("content")
        if isinstance(content, list) and content:
            text = content[-1]["text"]
            content[-1]["text"] = text + CONTINUE_TAG
        elif isinstance(content, str):
            text = content
            chat[-1]["content"] = text + CONTINUE_TAG
        else:
            raise RequestError(
                "continue_final_message needs a last message with text content: give it some, or set it to False",
                param="continue_final_message",
            )
        return str(text)


def loops_over_content(template: nodes.Template) -> bool:
    """Whether a template goes through the parts of a message's content, rather than taking it as a string.

    Found in its syntax tree: a loop over ``message.content``, ``message["content"]`` or a variable set to it.
    """
    names = {
        assign.target.name
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    return any(_is_content(loop.iter, frozenset(names)) for loop in template.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: frozenset[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _part_text(place: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS or not isinstance(part, dict):
        raise RequestError(
            f"{place} must be {{'type': 'text', 'text': ...}}, got "
            + (f"type {kind!r:.40}: this model takes text only" if kind else f"{part!r:.80}"),
            param="messages",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{place}.text must be a string, got {text!r:.80}", param="messages")
    return text


def _read_arguments(call: object) -> None:
    """Arguments given as JSON text become the object it stands for; other text is left to the template."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            return
        if isinstance(arguments, dict):
            function["arguments"] = arguments


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    return (
        message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
    )


def _plain_mappings(name: str, values: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if values is None:
        return None
    plain = plain_data(list(values))
    for index, value in enumerate(plain):
        if not isinstance(value, dict):
            raise RequestError(f"{name}[{index}] must be a mapping, got {value!r:.80}", param=name)
    return list(plain)


def _cut_at_tag(rendered: str, final: str) -> str:
    """The rendering up to the end of the last message; a template may have stripped the space at its end."""
    tag = CONTINUE_TAG.strip()
    place = rendered.rfind(tag)
    if place < 0 or final.strip() not in rendered:
        raise RequestError(
            "the chat template does not show the last message as it is, so it cannot be continued: "
            "set continue_final_message=False",
            param="continue_final_message",
        )
    return rendered[:place] if rendered.startswith(CONTINUE_TAG, place) else rendered[:place].rstrip()
