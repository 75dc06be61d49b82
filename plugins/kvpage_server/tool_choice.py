"""Whether a chat request wants tool calls found in its answer, and by which parser."""

from __future__ import annotations

from dataclasses import dataclass

from kvpage_server.chat_answers import MakeParser
from kvpage_server.errors import bad_request, not_implemented
from kvpage_server.protocol.chat import ChatRequest
from kvpage_server.service import Service
from kvpage_server.tools import PARSERS


@dataclass(frozen=True, slots=True)
class WantedParser:
    """``make`` gives a fresh parser for a choice; ``special_tokens``: they must stay in its text."""

    make: MakeParser
    special_tokens: bool


def wanted_parser(body: ChatRequest, service: Service) -> WantedParser | None:
    """The parser for this request's answer; ``None`` where the answer is text.

    Raises:
        ApiError: 400 or 501, the choice of tools makes no sense or cannot be kept.
    """
    settings, tools, choice = service.settings, body.tools, body.tool_choice
    if tools is not None and not tools:
        raise bad_request("tools is empty: give at least one, or leave it out", "tools")
    for tool in tools or ():
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request("each of tools must hold a function with a name", "tools")
    if choice is None:
        choice = "auto" if tools else "none"
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise bad_request(
            f"tool_choice must be 'none', 'auto', 'required' or a function, got {choice[:40]!r}",
            "tool_choice",
        )
    if choice == "none":
        return None
    if not tools:
        raise bad_request(
            f"tool_choice {choice if isinstance(choice, str) else 'of a function'} needs tools", "tool_choice"
        )
    if choice != "auto":
        raise not_implemented(
            "tool_choice other than 'auto' and 'none' needs structured output, which has not landed yet: use 'auto'",
            "tool_choice",
        )
    if not settings.enable_auto_tool_choice or settings.tool_call_parser is None:
        raise bad_request(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set: '
            "start the server with both, or send tool_choice='none'",
            "tool_choice",
        )
    entry = PARSERS[settings.tool_call_parser]
    factory = entry.load()
    return WantedParser(lambda: factory(tools), entry.special_tokens)
