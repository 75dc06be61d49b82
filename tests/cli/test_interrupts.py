"""Ctrl-C is never lost, never an error, and never cuts an import or a step in the middle."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvpage import Engine
from kvpage.cli.main import main
from kvpage.cli.signals import interruptible, undivided

QUIET = ("--load-format", "dummy", "--log-level", "error", "--num-kv-blocks", "64")
LONG = ("--max-tokens", "50", "--ignore-eos")


def press_control_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler_is_put_back() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every step of any engine, told when it is through; in the third, Ctrl-C is pressed."""
    through: list[bool] = []
    step = Engine.step

    def press_in_the_third(engine: Engine) -> bool:
        if len(through) == 2:
            press_control_c()
        more = step(engine)
        through.append(more)
        return more

    monkeypatch.setattr(Engine, "step", press_in_the_third)
    return through


def undivided_block(presses: int, through: list[str], error: Exception | None = None) -> None:
    """Ctrl-C as often as asked, in code that takes any exception and goes on."""
    with undivided():
        for _ in range(presses):
            try:
                press_control_c()
                through.append("whole")
            except KeyboardInterrupt:
                through.append("cut")
        if error is not None:
            raise error


def test_what_swallows_exceptions_does_not_swallow_control_c() -> None:
    through: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        undivided_block(1, through)
    assert through == ["whole"]


def test_control_c_goes_before_an_error_of_the_block() -> None:
    with pytest.raises(KeyboardInterrupt):
        undivided_block(1, [], ImportError("half a library"))


def test_a_second_control_c_interrupts_at_once() -> None:
    through: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        undivided_block(2, through)
    assert through == ["whole", "cut"]


def test_without_control_c_only_the_block_s_own_error_comes_out() -> None:
    undivided_block(0, [])
    with pytest.raises(ImportError, match="half a library"):
        undivided_block(0, [], ImportError("half a library"))


def test_an_ignored_control_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as asked:
            press_control_c()
        assert not asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [None, ImportError("cannot load module more than once per process")])
def test_control_c_while_the_engine_is_made_ends_with_130(
    checkpoint: str,
    error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class SlowToStart(Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            try:
                press_control_c()
            except BaseException:
                pytest.fail("the engine was cut while it was made")
            if error is not None:
                raise error
            super().__init__(*arguments, **options)

    monkeypatch.setattr("kvpage.engine.engine.Engine", SlowToStart)
    assert main(["generate", "hi", "--model", checkpoint, *QUIET, *LONG]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", "")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "hi", *LONG),
        ("generate", "hi", "--json", *LONG),
        ("inspect",),
        ("chat", "--quick", "hi", *LONG),
    ],
)
def test_control_c_ends_a_run_between_two_steps(
    checkpoint: str, command: tuple[str, ...], steps: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--model", checkpoint, *QUIET]) == 130
    assert steps == [True] * 3
    assert capsys.readouterr().err.strip() == ""


def test_control_c_ends_a_piped_chat_and_not_just_an_answer(
    checkpoint: str, steps: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", checkpoint, *QUIET, *LONG]) == 130
    assert len(steps) == 3
