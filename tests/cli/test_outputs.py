"""Where answers go: an output that takes nothing is one line and a status, and a bad path is found before the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpage.cli.main import main

FULL = "/dev/full"


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        pytest.fail("an engine was made")

    monkeypatch.setattr("kvpage.engine.engine.Engine", refuse)


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--help"), ("plan", "demo", "--device", "cpu")])
def test_a_full_disk_is_one_line_and_status_2(arguments: tuple[str, ...]) -> None:
    with open(FULL, "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvpage", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    assert done.stderr == f"error: standard output cannot be written: {os.strerror(28)}\n"
    assert done.returncode == 2


@pytest.mark.usefixtures("no_engine")
def test_a_closed_output_is_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["generate", "hi"]) == 2
    assert capsys.readouterr().err == "error: standard output is closed: nothing could be answered\n"


@pytest.mark.parametrize(
    ("command", "word"), [("generate", "no prompt"), ("chat", "standard input is closed")]
)
def test_a_closed_input_is_said(
    checkpoint: str,
    command: str,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main([command, "--model", checkpoint, "--load-format", "dummy", "--num-kv-blocks", "8"]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    "command",
    [("bench", "throughput", "--output-json"), ("bench", "latency", "--output-json"), ("inspect", "--svg")],
)
@pytest.mark.parametrize(("place", "word"), [("no/result", "there is no folder"), ("", "it is a folder")])
def test_a_path_that_cannot_be_written_is_found_before_the_run(
    checkpoint: str,
    tmp_path: Path,
    command: tuple[str, ...],
    place: str,
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, str(tmp_path / place), "--model", checkpoint]) == 2
    assert f"cannot be written: {word}" in capsys.readouterr().err
