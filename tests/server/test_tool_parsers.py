"""Parsers of tool calls: whole texts, streams however they are split, and texts that only look like calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvpage_server.tools import PARSERS, ToolDelta, ToolParser

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "add", "größe")
]
NAMES = ("hermes", "llama3_json")


def parser(name: str) -> ToolParser:
    return PARSERS[name].load()(TOOLS)


@dataclass
class Streamed:
    """What the deltas of a stream add up to."""

    content: str = ""
    names: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def add(self, deltas: Sequence[ToolDelta]) -> None:
        for delta in deltas:
            self.content += delta.content
            if delta.index is None:
                assert delta.content
                assert delta.name is None
                assert not delta.arguments
                continue
            if delta.name is not None:
                assert delta.index == len(self.names)
                self.names.append(delta.name)
                self.arguments.append("")
            assert delta.index == len(self.names) - 1
            self.arguments[delta.index] += delta.arguments


def stream(name: str, pieces: Sequence[str]) -> Streamed:
    reading, seen = parser(name), Streamed()
    for piece in pieces:
        seen.add(reading.feed(piece))
    seen.add(reading.finish())
    return seen


def whole(name: str, text: str) -> tuple[str, list[tuple[str, object]]]:
    content, calls = parser(name).parse(text)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


HERMES_CASES = {
    "a call": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "",
               [("weather", {"city": "Paris"})]),
    "text before and after": ('Let me see.\n<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>\nDone.',
                              "Let me see.Done.", [("add", {"a": 1})]),
    "two calls": ('<tool_call>{"name": "add", "arguments": {}}</tool_call>\n<tool_call>\n{"name": "weather", '
                  '"arguments": {"days": [1, {"n": null}]}}</tool_call>', "",
                  [("add", {}), ("weather", {"days": [1, {"n": None}]})]),
    "no end tag": ('<tool_call>{"name": "add", "arguments": {"a": -1.5e3}}', "", [("add", {"a": -1500.0})]),
    "arguments before the name": ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    "no arguments": ('<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    "null arguments": ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", {})]),
    "arguments as a string": ('<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\\\n\\"}"}</tool_call>', "",
                              [("add", {"a": "\n"})]),
    "unicode escapes": ('<tool_call>{"name": "gr\\u00f6\\u00dfe", "arguments": {"a": "\\ud83d\\ude00 é"}}</tool_call>',
                        "", [("größe", {"a": "😀 é"})]),
    "raw newlines in a string": ('<tool_call>{"name": "add", "arguments": {"code": "a\n\tb"}}</tool_call>', "",
                                 [("add", {"code": "a\n\tb"})]),
    "a name that is no tool": ('<tool_call>{"name": "fly", "arguments": {}}</tool_call>', "", [("fly", {})]),
    "tags in a string": ('<tool_call>{"name": "add", "arguments": {"t": "</tool_call><tool_call>"}}</tool_call>', "",
                         [("add", {"t": "</tool_call><tool_call>"})]),
    "broken, then a call": ('<tool_call>{name: add}</tool_call><tool_call>{"name": "add"}</tool_call>',
                            "<tool_call>{name: add}</tool_call>", [("add", {})]),
}  # fmt: skip
LLAMA_CASES = {
    "a call": ('{"name": "weather", "parameters": {"city": "Paris"}}', "", [("weather", {"city": "Paris"})]),
    "python tag": ('<|python_tag|>{"name": "weather", "parameters": {}}', "", [("weather", {})]),
    "several": ('{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "arguments": {}}\n{"name": "add", '
                '"parameters": {"a": {"b": [true, false]}}}', "",
                [("add", {"a": 1}), ("weather", {}), ("add", {"a": {"b": [True, False]}})]),
    "text before": ('I look it up:\n\n{"name": "add", "parameters": {}} so.', "I look it up:so.", [("add", {})]),
    "with a type": ('{"type": "function", "name": "add", "parameters": {"a": "1"}}', "", [("add", {"a": "1"})]),
    "JSON that names no tool": ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    "JSON that is no call": ('{\n "answer": {"name": "add", "parameters": {}}}',
                             '{\n "answer": {"name": "add", "parameters": {}}}', []),
    "a name without arguments": ('{"name": "add"}', '{"name": "add"}', []),
    "inside a line": ('see {"name": "add", "parameters": {}}', 'see {"name": "add", "parameters": {}}', []),
    "code": ("int main() {\n  {return 0;}\n}", "int main() {\n  {return 0;}\n}", []),
    "python code": ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
}  # fmt: skip
CASES = [("hermes", title, *case) for title, case in HERMES_CASES.items()] + [
    ("llama3_json", title, *case) for title, case in LLAMA_CASES.items()
]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"), [pytest.param(c[0], *c[2:], id=f"{c[0]}: {c[1]}") for c in CASES]
)
def test_a_whole_text_gives_its_content_and_calls(
    name: str, text: str, content: str, calls: list[tuple[str, object]]
) -> None:
    assert whole(name, text) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"), [pytest.param(c[0], *c[2:], id=f"{c[0]}: {c[1]}") for c in CASES]
)
def test_a_stream_of_single_characters_gives_the_same(
    name: str, text: str, content: str, calls: list[tuple[str, object]]
) -> None:
    seen = stream(name, list(text))
    assert seen.content == content
    assert [(n, json.loads(a)) for n, a in zip(seen.names, seen.arguments, strict=True)] == calls


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "<|python_tag|>", "<|py", "{", "}", "[", "]", ",", ":", ";", '"', "\\", "\n",
     " " * 3, "\n" * 70, " " * 64, '"name"', '"add"', '"arguments"', '"parameters"', '"a": 1', "null", "true", "-1.5", "é",
     "{}", "\\u00e9", '{"name": "add", "parameters": {"a": ', '{"name": "add", "arguments": {}}', "hello", "{{"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["weather", "add", "größe"]), st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


def split(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(
    pieces=st.lists(FRAGMENTS | st.text(max_size=3), max_size=14),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
@example(pieces=["<tool_call>", '{"name": "add", "arguments": {}}', "\n" * 70, "x"], cuts=[40])
@example(pieces=["<|python_tag|>", " " * 64, '{"name": "add", "parameters": {}}'], cuts=[])
def test_however_a_text_is_split_the_deltas_add_up_to_the_same(
    name: str, pieces: list[str], cuts: list[int]
) -> None:
    text = "".join(pieces)
    once = stream(name, [text])
    assert stream(name, split(text, cuts)) == once
    assert stream(name, list(text)) == once
    content, calls = parser(name).parse(text)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert (call.name, call.arguments) in zip(once.names, once.arguments, strict=True)
    if len(calls) == len(once.names):  # no call broke off after a stream had begun to tell of it
        assert once.content == content


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80)
@given(calls=CALLS, ascii=st.booleans(), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_calls_come_back_as_they_were_written(
    name: str, calls: list[tuple[str, dict[str, object]]], ascii: bool, cuts: list[int]
) -> None:
    key = "arguments" if name == "hermes" else "parameters"
    written = [json.dumps({"name": n, key: a}, ensure_ascii=ascii) for n, a in calls]
    text = (
        "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)
        if name == "hermes"
        else "; ".join(written)
    )
    assert whole(name, text) == ("", calls)
    seen = stream(name, split(text, cuts))
    assert [(n, json.loads(a)) for n, a in zip(seen.names, seen.arguments, strict=True)] == calls
    assert seen.content == ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        '{"name": "add", "KEY": {"a": 1',
        '{"name": "add", "KEY": {"a": 1}',
        '{"name": "add", "KEY": {"a": 01}}',
        '{"name": "add", "KEY": {"a": 1,}}',
        '{"name": "add", "KEY": {"a": tru}}',
        '{"name": "add", "KEY": {"a": "\\x"}}',
        '{"name": "add", "KEY": [1]}',
        '{"name": "add", "KEY": "no JSON"}',
        '{"name": "add", "KEY": {}, "KEY": {}}',
        '{"name": "", "KEY": {}}',
        '{"name": 5, "KEY": {}}',
        '{"KEY": {"name": "add"}}',
        "{'name': 'add', 'KEY': {}}",
        '{"name": "add", "KEY": ' + '{"a":' * 70 + "1" + "}" * 71,
    ],
)
def test_a_call_that_is_malformed_or_cut_off_is_content(name: str, text: str) -> None:
    text = text.replace("KEY", "arguments" if name == "hermes" else "parameters")
    if name == "hermes":
        text = "<tool_call>" + text
    assert parser(name).parse(text) == (text, [])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_given_out_while_they_grow(name: str) -> None:
    reading = parser(name)
    reading.feed(reading.force("weather"))
    seen: list[str] = []
    for piece in ['"city": "Pa', 'ris", "days', '": 3}']:
        seen += [delta.arguments for delta in reading.feed(piece)]
    assert seen == ['"city": "Pa', 'ris", "days', '": 3}']


@pytest.mark.parametrize("name", NAMES)
def test_only_what_may_begin_a_call_is_held_back(name: str) -> None:
    reading = parser(name)
    assert reading.feed("Sure, a < b")[0].content == "Sure, a < b"
    held = "<tool_c" if name == "hermes" else "<|python"
    assert reading.feed(held) == []
    assert reading.feed("heese>") == [ToolDelta(content=held + "heese>")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "unit", ["\n", "{", "<tool_call>", "<|python_tag|>", "\n{", '{"', "<tool_call>{", " "]
)
def test_a_long_degenerate_text_is_read_in_linear_time(name: str, unit: str) -> None:
    text = unit * (200_000 // len(unit))
    content, calls = parser(name).parse(text)
    assert calls == []
    assert content == text
