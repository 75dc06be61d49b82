"""A request of /v1/responses as the chat request that says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvpage_server.errors import ApiError, bad_request
from kvpage_server.protocol.chat import ChatRequest
from kvpage_server.protocol.responses import ResponsesRequest

SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "logits_processors", "vllm_xargs",
    "parallel_tool_calls", "stream", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "priority",
    "request_id", "cache_salt",
)  # fmt: skip
"""Fields that mean the same in both."""
WITHOUT_EFFECT = (
    "include", "max_tool_calls", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "stream_options", "user",
)  # fmt: skip
STATELESS = "this server keeps no state between requests: "
REFUSED: Mapping[str, str] = {
    "store": STATELESS + "send store=false, or leave it out, and the whole conversation as input each time",
    "background": STATELESS + "wait for the answer, or stream it",
    "previous_response_id": STATELESS + "send the whole conversation as input",
    "conversation": STATELESS + "send the whole conversation as input",
    "prompt": "prompt templates are stored at OpenAI: send instructions and input",
    "top_logprobs": "log-probabilities are answered by /v1/chat/completions: leave it out",
}
LOGPROBS = "message.output_text.logprobs"


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat request.

    Raises:
        ApiError: 400, the request asks for what a server without memory cannot do, or an item is malformed.
    """
    _refuse(body)
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        _add_items(messages, body.input)
    return ChatRequest(
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        tools=[_chat_tool(index, tool) for index, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=_chat_choice(body),
        reasoning_effort=_effort(body),
        **{name: getattr(body, name) for name in SAME},
    )


def _refuse(body: ResponsesRequest) -> None:
    for name, reason in REFUSED.items():
        if getattr(body, name) not in (None, False, 0):
            raise bad_request(f"{name} is not supported: {reason}", name)
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise bad_request(
            f"max_output_tokens must be at least 1, got {body.max_output_tokens}", "max_output_tokens"
        )
    if LOGPROBS in (body.include or ()):
        raise bad_request(f"include={LOGPROBS} is not supported: {REFUSED['top_logprobs']}", "include")
    if body.truncation not in (None, "disabled"):
        raise bad_request("truncation is not supported but as 'disabled': send less input", "truncation")
    form = (body.text or {}).get("format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise bad_request(
            "text.format is not supported but as {'type': 'text'}: structured output has not landed yet",
            "text",
        )


def _effort(body: ResponsesRequest) -> str | None:
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise bad_request("reasoning.effort must be a string", "reasoning")
    return effort


def _chat_choice(body: ResponsesRequest) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if not body.tools and choice == "auto":
        return None  # what clients send by default
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _chat_tool(index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise bad_request(
            f"tools[{index}]: only functions are called here, got the type {tool.get('type')!r:.40}", "tools"
        )
    function = {
        name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _add_items(messages: list[dict[str, Any]], items: Sequence[Mapping[str, Any]]) -> None:
    if not items:
        raise bad_request("input is an empty list: give at least one item", "input")
    for index, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            # "developer" is the newer word for "system", which is the one that chat templates know.
            messages.append(
                {"role": "system" if role == "developer" else role, "content": item.get("content")}
            )
        elif kind == "function_call":
            _add_call(messages, index, item)
        elif kind == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": _text(index, item, "call_id"),
                    "content": item.get("output"),
                }
            )
        else:
            raise _bad_item(index, f"items of the type {kind!r:.40} are not supported")


def _add_call(messages: list[dict[str, Any]], index: int, item: Mapping[str, Any]) -> None:
    """A call of the assistant's; calls in a row, and the text before them, are one message."""
    call = {
        "id": _text(index, item, "call_id"),
        "type": "function",
        "function": {"name": _text(index, item, "name"), "arguments": _text(index, item, "arguments")},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _text(index: int, item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _bad_item(index, f"{name} must be a string, got {value!r:.40}")
    return value


def _bad_item(index: int, problem: str) -> ApiError:
    return bad_request(f"input[{index}]: {problem}", "input")
