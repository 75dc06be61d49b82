"""The argument parser of every command: forgiving about how a flag is typed, clear about what is wrong."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from kvpage.errors import KvpageError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

DASHES = {"\u2013": "an en dash", "\u2014": "an em dash", "\u2212": "a minus sign"}
FLAG_WITH_DASH = re.compile(r"[-\u2013\u2014\u2212]{1,2}[A-Za-z][\w\u2013\u2014\u2212-]*(=.*)?", re.DOTALL)
HUMAN_INTEGER = re.compile(r"(-?\d+(?:\.\d+)?)([kKmMgG]?)")
MULTIPLIERS = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


class UsageError(KvpageError):
    """The command line makes no sense; the message names the flag and the way out."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, flags and their help side by side."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=34, **options)


class CommandParser(argparse.ArgumentParser):
    """argparse, but ``_`` and ``-`` are the same in flags, abbreviations are not guessed, and errors are typed.

    Raises:
        UsageError: from ``parse_args``, in place of argparse's exit.
    """

    def __init__(self, prog: str, description: str, arguments: str = "") -> None:
        """``arguments``: what stands by position, for the usage line ("[MODEL]")."""
        usage = " ".join(part for part in (prog, arguments, "[FLAGS]") if part)
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def parse_arguments(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, words and flags in any order; unknown flags are refused with the nearest known one."""
        namespace, unknown = self.parse_known_intermixed_args([normalise(argument) for argument in arguments])
        if unknown:
            self.error(self._unknown(unknown[0]))
        return namespace

    def actions_by_flag(self) -> dict[str, argparse.Action]:
        """Every spelling of every flag."""
        return dict(self._option_string_actions)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """argparse's own hides that the output cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def _unknown(self, argument: str) -> str:
        flag = argument.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {argument!r}; put quotes around text with spaces"
        known = sorted(self._option_string_actions)
        longer = [name for name in known if flag.startswith("--") and name.startswith(flag)]
        near = longer[:1] or difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
        return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "")


def normalise(argument: str) -> str:
    """A flag as it is declared: hyphens for underscores.

    Raises:
        UsageError: a flag was typed with a typographic dash, as text copied from a web page has it.
    """
    if not FLAG_WITH_DASH.fullmatch(argument):
        return argument
    flag, equals, value = argument.partition("=")
    for dash, name in DASHES.items():
        if dash in flag:
            plain = "--" + re.sub("[\u2013\u2014\u2212]", "-", flag).lstrip("-")
            raise UsageError(f"you typed {name} ({dash}) in {flag!r}: type hyphens instead, {plain}")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")
    return flag + equals + value


def human_integer(text: str) -> int:
    """An integer, "1k" = 1000, "1K" = 1024, and m, M, g, G alike."""
    match = HUMAN_INTEGER.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number such as 4096, 4k (4000) or 4K (4096)"
        )
    whole, _, fraction = match[1].partition(".")
    parts = int("1" + "0" * len(fraction))
    value, rest = divmod(int(whole + fraction) * MULTIPLIERS[match[2]], parts)
    if rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return value


def check_at_least(lowest: int, namespace: argparse.Namespace, *names: str) -> None:
    """Raises UsageError where a flag's value is below ``lowest``."""
    for name in names:
        if getattr(namespace, name) < lowest:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be at least {lowest}, got {getattr(namespace, name)}")
