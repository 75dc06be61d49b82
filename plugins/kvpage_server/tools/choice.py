"""What a chat request says about tools, and its answer's calls as OpenAI's clients read them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpage_server.errors import ApiError, bad_request
from kvpage_server.settings import ServerSettings
from kvpage_server.tools import PARSERS, Tool, ToolDelta, ToolParser, ToolParserFactory

MAX_NAME = 256
AUTO_IS_OFF = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
USAGE = '{"type": "function", "function": {"name": "my_function"}}'


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How the tools of one request are shown, and the calls in its answers found.

    Attributes:
        tools: what the chat template shows; ``None`` = no tools.
        factory: of the parser of each choice; ``None``: answers are text.
        prefix: put behind the prompt; it begins the call that the request insists on.
        named: the request insists on one call of one function.
        parallel: several calls may be answered.
        special_tokens: special tokens must stay in the text, for calls are marked by them.
    """

    tools: Sequence[Tool] | None = None
    factory: ToolParserFactory | None = None
    prefix: str = ""
    named: bool = False
    parallel: bool = True
    special_tokens: bool = False

    def check_shown(self, prompt: str) -> None:
        """Raises ApiError if ``prompt``, made by the chat template, does not show the tools that it should."""
        for tool in (self.tools or ()) if self.factory is not None else ():
            name = tool["function"]["name"]
            if name.isascii() and name not in prompt:
                raise bad_request(
                    "this model's chat template does not show tools to the model: leave tools out, or start the "
                    "server with a --chat-template that does",
                    "tools",
                )

    def reader(self) -> ToolReader:
        """For the text of one choice."""
        if self.factory is None:
            raise ValueError("answers of this request are text")
        return ToolReader(self, self.factory(self.tools or ()))


def plan_tools(
    settings: ServerSettings,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> ToolPlan:
    """What ``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a request come to.

    A call that the request insists on is begun in the model's name, so that it cannot but go on with it; that its
    arguments fit their schema is not certain until structured output has landed.

    Raises:
        ApiError: 400, they are malformed or contradict each other, or the server was not started for them.
    """
    if tools is not None:
        _check_tools(tools)
    if choice == "none" or (choice is None and tools is None):
        return ToolPlan(tools)
    if tools is None:
        raise bad_request("When using `tool_choice`, `tools` must be set.", "tool_choice")
    name = _named_function(choice, tools)
    entry = PARSERS.get(settings.tool_call_parser or "")
    if choice is None or choice == "auto":
        if entry is None or not settings.enable_auto_tool_choice:
            raise bad_request(AUTO_IS_OFF, "tool_choice")
    elif entry is None:
        raise bad_request(
            "tool_choice needs a server that was started with --tool-call-parser", "tool_choice"
        )
    factory = entry.load()
    forced = factory(tools).force(name) if name is not None or choice == "required" else ""
    return ToolPlan(tools, factory, forced, name is not None, parallel is not False, entry.special_tokens)


class ToolReader:
    """The text of one choice -> content and calls; ``called`` once there is a call."""

    def __init__(self, plan: ToolPlan, parser: ToolParser) -> None:
        self._plan, self._parser = plan, parser
        self._prefix = plan.prefix
        self._pending = parser.feed(plan.prefix) if plan.prefix else []
        self.called = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The ``delta`` objects, {"content": ...} or {"tool_calls": [...]}, that became certain."""
        pending, self._pending = self._pending, []
        return self._objects([*pending, *self._parser.feed(text)])

    def finish(self) -> list[dict[str, Any]]:
        """The rest, once no more text comes."""
        pending, self._pending = self._pending, []
        return self._objects([*pending, *self._parser.finish()])

    def whole(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(content, calls) of a whole text; in place of ``feed`` and ``finish``."""
        if self._prefix:
            # The call was begun for the model, so however it went on, that call is the answer.
            return gathered([*self.feed(text), *self.finish()])
        content, calls = self._parser.parse(text)
        if not self._plan.parallel:
            del calls[1:]
        self.called = bool(calls)
        return content, [call_object(call.name, call.arguments) for call in calls]

    def finish_reason(self, reason: str | None) -> str | None:
        """As OpenAI has it: "tool_calls" in place of "stop" where there is a call, but not where the request named
        the function."""
        return "tool_calls" if self.called and reason == "stop" and not self._plan.named else reason

    def _objects(self, deltas: Sequence[ToolDelta]) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = []
        for delta in deltas:
            if delta.index is None:
                content = delta.content.removeprefix(self._prefix)
                self._prefix = ""
                if content and not (self._plan.named and self.called):
                    objects.append({"content": content})
            elif delta.index == 0 or (self._plan.parallel and not self._plan.named):
                self.called, self._prefix = True, ""
                objects.append({"tool_calls": [_call_delta(delta)]})
        return objects


def call_object(name: str, arguments: str) -> dict[str, Any]:
    """An entry of ``message.tool_calls``."""
    return {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def call_id() -> str:
    """A fresh one."""
    return f"call_{secrets.token_hex(12)}"


def gathered(deltas: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """(content, calls) that ``delta`` objects add up to."""
    content = ""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append(call_object(part["function"]["name"], ""))
                calls[-1]["id"] = part["id"]
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls


def _call_delta(delta: ToolDelta) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **call_object(delta.name, delta.arguments)}


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    if not tools:
        raise bad_request("tools must not be empty: leave it out", "tools")
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise _bad_tool(
                index, f'only {{"type": "function", "function": {{...}}}} is known, got {tool!r:.80}'
            )
        name = function.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise _bad_tool(index, f"function.name must be a string of 1 to {MAX_NAME} characters")
        if not isinstance(function.get("parameters"), (Mapping, type(None))):
            raise _bad_tool(index, "function.parameters must be an object (a JSON schema)")
        if not isinstance(function.get("description"), (str, type(None))):
            raise _bad_tool(index, "function.description must be a string")


def _bad_tool(index: int, problem: str) -> ApiError:
    return bad_request(f"tools[{index}]: {problem}", "tools")


def _named_function(choice: str | Mapping[str, Any] | None, tools: Sequence[Tool]) -> str | None:
    """The function that ``tool_choice`` names; ``None``: it names none."""
    if choice is None or choice in ("auto", "required"):
        return None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, Mapping) or choice.get("type") != "function" or not isinstance(name, str):
        raise bad_request(
            f'tool_choice must be "none", "auto", "required" or {USAGE}, got {choice!r:.100}', "tool_choice"
        )
    if all(tool["function"]["name"] != name for tool in tools):
        raise bad_request(
            "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
        )
    return name
