"""The program finds commands, says what is wrong in one line, and leaves with the right status."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence

import pytest

import kvpage
from kvpage.api.records import CliCommandRecord
from kvpage.cli.main import COMMANDS, main
from kvpage.errors import KvpageError
from kvpage.flags.parser import UsageError


def greet(arguments: Sequence[str]) -> int:
    """A plugin's command."""
    print("hello", *arguments)
    logging.getLogger("kvpage").info("a note")
    return 7


def fail(_arguments: Sequence[str]) -> int:
    """A command that ends in one of kvpage's errors."""
    raise KvpageError("7 is more than 5: use at most 5")


def interrupted(_arguments: Sequence[str]) -> int:
    """A command that is stopped by Ctrl-C."""
    raise KeyboardInterrupt


def plugin_commands() -> list[CliCommandRecord]:
    return [
        CliCommandRecord(
            name=function.__name__, help="from a plugin", factory=f"{__name__}:{function.__name__}"
        )
        for function in (greet, fail, interrupted)
    ]


def run(*arguments: str) -> int:
    return main(arguments, plugin_commands)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], []])
def test_help_names_every_command_and_those_of_plugins(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == (0 if arguments else 2)
    out = capsys.readouterr().out
    assert all(f"  {command.name} " in out for command in COMMANDS)
    assert "greet" in out


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"kvpage {command}" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"kvpage {kvpage.__version__}\n"


def test_a_plugin_s_command_gets_the_rest_of_the_line_and_its_status_is_the_program_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("greet", "a", "--b", "--log-level", "warning") == 7
    captured = capsys.readouterr()
    assert captured.out == "hello a --b\n"
    assert captured.err == ""


def test_notes_go_to_stderr_and_logging_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("kvpage")
    before = (logger.level, list(logger.handlers))
    assert run("greet") == 7
    assert capsys.readouterr().err == "a note\n"
    assert (logger.level, list(logger.handlers)) == before


def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: 7 is more than 5: use at most 5\n"


def test_traceback_shows_where_an_error_came_from() -> None:
    with pytest.raises(KvpageError, match="7 is more than 5"):
        run("fail", "--traceback")


def test_control_c_ends_with_130() -> None:
    assert run("interrupted") == 130


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pln", "did you mean plan?"), ("grete", "did you mean greet?"), ("zzz", "there are generate, "),
     ("serve", "pip install 'kvpage[server]'")],
)  # fmt: skip
def test_an_unknown_command_gets_a_hint(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name) == 2
    assert hint in capsys.readouterr().err


def test_an_unknown_log_level_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("greet", "--log-level=loud") == 2
    assert "debug, info" in capsys.readouterr().err


def test_underscores_do_for_hyphens_in_a_command_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("collect_env", "--help") == 0
    assert "collect-env" in capsys.readouterr().out


def test_an_output_that_nobody_reads_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "kvpage", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        errors = program.stderr.read()
        status = program.wait(timeout=30)
    assert (status, errors) == (141, "")


def test_usage_errors_are_kvpage_errors() -> None:
    assert issubclass(UsageError, KvpageError)
