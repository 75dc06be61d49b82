"""A command line as it was typed -> the flags of ``serve``: --config files, and flags that only vLLM has."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvpage.flags.engine import model_was_named
from kvpage.flags.parser import CommandParser, UsageError, normalise
from kvpage_server.vllm_flags import explain_unknown_flag

LOG = logging.getLogger("kvpage.server")
FLAG = re.compile(r"--?[A-Za-z]")


def read_flags(parser: CommandParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line and of the file that ``--config`` names; what is typed wins.

    Raises:
        UsageError: a flag or a key is unknown, refused, or its value makes no sense.
    """
    typed = [normalise(argument) for argument in arguments]
    known = parser.actions_by_flag()
    file = _config_file(typed)
    entries = {} if file is None else _read_config(file, known)
    model = entries.pop("--model", None)
    own = {action for argument in typed if (action := known.get(argument.partition("=")[0])) is not None}
    words: list[str] = []
    for flag, value in entries.items():
        if known.get(flag) not in own or flag not in known:
            words += _as_words(flag, value, known.get(flag))
    namespace = parser.parse_arguments(
        [word for part in (words, typed) for word in _without_foreign(part, known, parser.prog)]
    )
    if model is not None and not model_was_named(namespace):
        namespace.model = str(model)
    return namespace


def _without_foreign(words: Sequence[str], known: Mapping[str, argparse.Action], prog: str) -> list[str]:
    """The words without vLLM's flags that mean nothing here, each of which is warned of."""
    kept: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--":
            return [*kept, *words[index:]]
        flag, equals, value = word.partition("=")
        index += 1
        if not FLAG.match(word) or flag in known or word in known:
            kept.append(word)
            continue
        following = words[index] if index < len(words) and not FLAG.match(words[index]) else None
        foreign = explain_unknown_flag(flag, value if equals else following)
        if foreign is None:
            kept.append(word)  # the parser knows what to say
            continue
        if foreign.fate == "refused":
            raise UsageError(f"{prog}: {flag}: {foreign.reason}")
        LOG.warning("%s is ignored: %s", flag, foreign.reason)
        left = 0 if equals else foreign.values
        while left and index < len(words) and not FLAG.match(words[index]):
            index, left = index + 1, left - 1
    return kept


def _config_file(typed: Sequence[str]) -> Path | None:
    for index, word in enumerate(typed):
        flag, equals, value = word.partition("=")
        if flag == "--config":
            if not equals and index + 1 == len(typed):
                raise UsageError("--config needs the name of a YAML file")
            return Path(value if equals else typed[index + 1])
    return None


def _read_config(file: Path, known: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """Flag -> value."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"--config {file}: cannot be read: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"--config {file}: it must hold one flag and its value a line, such as 'port: 8000'")
    entries = {}
    for key, value in content.items():
        flag = "--" + key.lstrip("-").replace("_", "-")
        if flag == "--config":
            raise UsageError(f"--config {file}: a config file cannot name another")
        if flag not in known and explain_unknown_flag(flag) is None:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0].lstrip('-')}?" if near else ""
            raise UsageError(f"--config {file}: unknown key {key!r}{hint}")
        if value is not None:
            entries[flag] = value
    return entries


def _as_words(flag: str, value: Any, action: argparse.Action | None) -> list[str]:
    """An entry of the file as it would be typed."""
    if isinstance(value, bool):
        if value:
            return [flag]
        return ["--no-" + flag[2:]] if isinstance(action, argparse.BooleanOptionalAction) else []
    if isinstance(value, dict) or (isinstance(value, list) and flag == "--allowed-origins"):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        if action is not None and action.nargs is None:
            return [f"{flag}={entry}" for entry in value]
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
