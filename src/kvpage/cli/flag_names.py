"""What the library calls an option, said as the flag that the user typed."""

from __future__ import annotations

import re
from dataclasses import fields

from kvpage.config import EngineOptions
from kvpage.flags.engine import NOT_ENGINE_FLAGS, NOT_SAMPLING_FLAGS
from kvpage.params import SamplingParams

VALUE = r"""=('[^']*'|"[^"]*"|[^\s,;:)]+)"""


def with_flags(message: str, *, sampling: bool, bare: bool = True) -> str:
    """``message`` with "--max-model-len 9" for "max_model_len=9", and "--max-model-len" for the bare name.

    A bare name without an underscore (n, stop) is a word like any other, unless the message begins with it.
    ``sampling``: whether the command takes sampling flags beside those of the engine. ``bare=False``: names without a
    value are something else's, such as the keys of a checkpoint's config.json.
    """
    names = {field.name for field in fields(EngineOptions)} - {*NOT_ENGINE_FLAGS}
    if sampling:
        names |= {field.name for field in fields(SamplingParams)} - {*NOT_SAMPLING_FLAGS}
    known = "|".join(sorted(names, key=len, reverse=True))
    plain = "|".join(sorted((name for name in names if "_" in name), key=len, reverse=True))
    # Not within a path, a flag or a longer name.
    pattern = rf"(?<![\w./-])(?:({known}){VALUE}|({plain})(?![\w./=-])|^({known})(?= (?:must|has|is)\b))"
    return re.sub(pattern, lambda match: _flag(match) if bare or match[1] else match[0], message)


def _flag(match: re.Match[str]) -> str:
    name, value = match[1] or match[3] or match[4], match[2]
    flag = name.replace("_", "-")
    if value is None or value == "True":
        return f"--{flag}"
    if value == "False":
        return f"--no-{flag}"
    return f"--{flag} {value if ' ' in value else value.strip(chr(39) + chr(34))}"
