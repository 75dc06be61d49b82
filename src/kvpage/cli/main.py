"""``kvpage``: finds the command and runs it. Nothing is imported before it is needed."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import kvpage
from kvpage.errors import CheckpointError, KvpageError

if TYPE_CHECKING:
    from kvpage.api.records import Record

OK, NO, ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
"""Exit statuses: done; done, and the answer is no; refused; Ctrl-C; the reader of our output went away."""

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class CommandLike(Protocol):
    """What a command is known by; ``kvpage_cli_commands`` hooks return records of this shape.

    ``factory`` names ``function(arguments) -> exit status`` as "package.module:function".
    """

    @property
    def name(self) -> str: ...
    @property
    def help(self) -> str: ...
    @property
    def factory(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Command:
    """A command that comes with kvpage."""

    name: str
    help: str
    factory: str


COMMANDS: tuple[Command, ...] = (
    Command("generate", "answer or continue prompts; text streams as it is made", "kvpage.cli.generate:run"),
    Command("complete", "go on with a text as it stands", "kvpage.cli.complete:run"),
    Command("chat", "talk to a model in the terminal, or to a server", "kvpage.cli.chat:run"),
    Command("plan", "will a model fit: weights, KV memory, sequences at once", "kvpage.cli.plan:run"),
    Command("inspect", "run a small load and draw the block map", "kvpage.cli.inspect:run"),
    Command("bench", "measure throughput, latency, or a running server", "kvpage.cli.bench:run"),
    Command("plugins", "list, explain and check plugins", "kvpage.cli.plugins:run"),
    Command("collect-env", "what a bug report needs to know of this machine", "kvpage.cli.collect_env:run"),
)
OF_THE_SERVER = ("serve", "run-batch")
"""Commands of the server plugin; missed where that is not installed."""
TAKE_SAMPLING_FLAGS = ("generate", "complete", "chat")
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What writing ends in where the disk, or whatever takes our output, does not take it."""


def main(
    argv: Sequence[str] | None = None, plugin_commands: Callable[[], Iterable[CommandLike]] | None = None
) -> int:
    """Run one command line and return its exit status.

    Args:
        argv: arguments without the program's name; ``None`` = those of this process.
        plugin_commands: finds the commands that plugins add; ``None`` = those of installed plugins.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:
        print("error: standard output is closed: nothing could be answered", file=sys.stderr)
        return ERROR
    traceback = _take_switch(arguments, "--traceback")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        try:
            with _logging(_take_value(arguments, "--log-level") or "info"):
                status = _dispatch(arguments, plugin_commands or _installed_commands)
        except SystemExit as stop:  # argparse, after --help
            status = stop.code if isinstance(stop.code, int) else OK
        sys.stdout.flush()
    except KvpageError as error:
        if traceback:
            raise
        print(f"error: {_with_flags(error, arguments)}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if traceback or error.filename is not None or error.errno not in OUTPUT_ERRORS:
            raise
        _drop_output()
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return ERROR
    return status


def _drop_output() -> None:
    """What is still buffered has nowhere to go; the interpreter must not try to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_flags(error: KvpageError, arguments: Sequence[str]) -> str:
    """An error of the library as one of the command line; what another's command says stays as it is."""
    message = str(error)
    ours = {*(command.name for command in COMMANDS), *OF_THE_SERVER}
    if not arguments or arguments[0].replace("_", "-") not in ours:
        return message
    from kvpage.cli.flag_names import with_flags  # only where there is an error to tell

    of_a_file = isinstance(error, CheckpointError)
    return with_flags(message, sampling=arguments[0] in TAKE_SAMPLING_FLAGS, bare=not of_a_file)


def _dispatch(arguments: list[str], plugin_commands: Callable[[], Iterable[CommandLike]]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help([*COMMANDS, *plugin_commands()]))
        return OK if arguments else ERROR
    name, *rest = arguments
    if name in ("-V", "-v", "--version"):
        print(f"kvpage {kvpage.__version__}")
        return OK
    name = name.replace("_", "-")
    commands: Iterable[CommandLike] = COMMANDS
    command = next((command for command in commands if command.name == name), None)
    if command is None:
        commands = [*COMMANDS, *plugin_commands()]
        command = next((command for command in commands if command.name.replace("_", "-") == name), None)
    if command is None:
        raise KvpageError(_unknown(name, [command.name for command in commands]))
    if isinstance(command, Command):
        module, _, function = command.factory.partition(":")
        return int(getattr(importlib.import_module(module), function)(rest))
    from kvpage.plugins import load  # not needed by kvpage's own commands

    return int(load(cast("Record", command))(rest))


def _help(commands: Sequence[CommandLike]) -> str:
    width = max(len(command.name) for command in commands)
    lines = [
        "usage: kvpage COMMAND [ARGUMENTS]",
        "",
        "An LLM serving engine that is a library: this is its command line.",
        "",
        "commands:",
        *(f"  {command.name:<{width}}  {command.help}" for command in commands),
        "",
        "for every command:",
        f"  {'--help':<{width + 2}}its arguments",
        f"  {'--log-level LEVEL':<{width + 2}}  of notes on stderr: {', '.join(LOG_LEVELS)} [info]",
        f"  {'--traceback':<{width + 2}}where an error came from",
        "",
        'start with: kvpage generate "What is a KV cache?"',
    ]
    return "\n".join(lines)


def _unknown(name: str, known: Sequence[str]) -> str:
    if name in OF_THE_SERVER:
        return (
            f"kvpage {name} comes with the server: pip install 'kvpage[server]'; there are {', '.join(known)}"
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"kvpage has no command {name!r}: {hint}"


def _installed_commands() -> Iterable[CommandLike]:
    """Commands of installed plugins, but those that could never be called by their name."""
    import logging

    from kvpage.plugins import PluginRegistry

    own = {command.name for command in COMMANDS} | {"help"}
    found: dict[str, CommandLike] = {}
    for record in PluginRegistry().cli_commands():
        name = record.name.replace("_", "-")
        if name in own or name in found:
            logging.getLogger("kvpage").warning(
                "the command %r of a plugin is left out: there is %s already", record.name, name
            )
        else:
            found[name] = record
    return found.values()


def _take_switch(arguments: list[str], flag: str) -> bool:
    """Remove ``flag`` wherever it stands before "--"; whether it did."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if flag not in arguments[:end]:
        return False
    arguments.remove(flag)
    return True


def _take_value(arguments: list[str], flag: str) -> str | None:
    """Remove ``flag VALUE`` or ``flag=VALUE`` wherever it stands before "--"; the value."""
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            if not equals and index + 1 == len(arguments):
                raise KvpageError(f"{flag} needs a value")
            taken = value if equals else arguments[index + 1]
            del arguments[index : index + (1 if equals else 2)]
            return taken
    return None


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """kvpage's own log lines on stderr while a command runs; as it was afterwards."""
    import logging

    if level.lower() not in LOG_LEVELS:
        raise KvpageError(f"--log-level {level}: choose one of {', '.join(LOG_LEVELS)}")
    logger = logging.getLogger("kvpage")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
