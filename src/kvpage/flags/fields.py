"""Flags made from the fields of an options class: name, type and default from the field, help from its docstring.

A flag that is not typed leaves no value behind, so that the class's own defaults stay the only ones.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Any

from kvpage.flags.parser import CommandParser, human_integer

Shorts = Mapping[str, tuple[str, ...]]
"""Field name -> further spellings of its flag."""


def add_flags(
    parser: CommandParser,
    options: type[Any],
    *,
    title: str,
    skip: Collection[str] = (),
    aliases: Shorts | None = None,
    defaults: Mapping[str, object] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """One flag for each field of the dataclass ``options`` that is not in ``skip``.

    ``defaults``: what a command takes in place of a field's own default, for the help text. ``texts``: help in
    place of the docstring's.
    """
    group = parser.add_argument_group(title)
    texts = {**field_help(options), **(texts or {})}
    for field in fields(options):
        if field.name not in skip:
            spellings = ("--" + field.name.replace("_", "-"), *(aliases or {}).get(field.name, ()))
            group.add_argument(*spellings, dest=field.name, default=argparse.SUPPRESS,
                               **_shape(field, texts.get(field.name, ""), defaults or {}))  # fmt: skip


def given(namespace: argparse.Namespace, options: type[Any], *, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of ``options`` whose flags were typed."""
    values = vars(namespace)
    return {f.name: values[f.name] for f in fields(options) if f.name in values and f.name not in skip}


def field_help(options: type[Any]) -> dict[str, str]:
    """Field name -> its text in the "Attributes:" section of the class's docstring."""
    section = (options.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    text = " ".join(section.split())
    names = "|".join(sorted((field.name for field in fields(options)), key=len, reverse=True))
    marks = list(re.finditer(rf"(?:^|(?<=[.,] )|(?<=, or ))((?:{names})(?:, (?:{names}))*): ", text))
    found: dict[str, str] = {}
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        end = following.start() if following else len(text)
        body = text[mark.end() : end].strip().removesuffix(", or").rstrip(".,").replace("``", "")
        for name in mark[1].split(", "):
            found[name] = body
    return found


def _shape(field: Field[Any], text: str, defaults: Mapping[str, object]) -> dict[str, Any]:
    """argparse keywords for a field, by its annotation (which ``__future__`` keeps as text)."""
    kind = str(field.type)
    text = text.replace("%", "%%")
    if kind == "bool":
        state = "on" if field.default else "off"
        return {"action": argparse.BooleanOptionalAction, "help": f"{text} [{state}]"}
    number = kind.removesuffix(" | None")
    optional = number != kind
    # A number may be taken back with "none"; any other flag by leaving it out.
    text = re.sub(r"\bNone\b", "none" if number in ("int", "float") else "not given", text)
    value = defaults.get(field.name, None if callable(field.default_factory) else field.default)
    shape: dict[str, Any] = {
        "help": text if value in (None, (), "") else f"{text} [{value}]",
        "metavar": "TEXT",
    }
    if "Sequence[" in kind:
        repeatable = {"action": "append", "help": f"{text}; repeatable"}
        return {**shape, **repeatable, **({"type": int, "metavar": "ID"} if "[int]" in kind else {})}
    if "Mapping" in kind:
        return {**shape, "type": _json_object, "metavar": "JSON"}
    if number == "int":
        read = _length if "len" in field.name else human_integer
        return {**shape, "type": _or_none(read) if optional else read, "metavar": "N"}
    if number == "float":
        return {**shape, "type": _or_none(_number) if optional else _number, "metavar": "X"}
    return shape


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read``, but "none" is ``None``."""
    return lambda text: None if text.lower() == "none" else read(text)


def _length(text: str) -> int | None:
    return None if text in ("auto", "-1") else human_integer(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.5") from None


def _json_object(text: str) -> dict[Any, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"name\": 1}}'")
    return {int(key) if key.lstrip("-").isdigit() else key: entry for key, entry in value.items()}
