"""What plugins say of themselves on this machine, and where it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from installed_plugins import forget, install, module
from kvpage import PluginRegistry
from kvpage.api.records import LinearKernelRecord
from kvpage.cli.main import main
from kvpage.errors import PluginError

CHIP = """
@hookimpl
def kvpage_linear_kernels():
    return [LinearKernelRecord(name="chip-linear", factory="chip:Linear", describe="chip:tell", priority=-300)]

@hookimpl
def kvpage_attention_backends():
    return [AttentionBackendRecord(name="chip", factory="chip:Attention", describe="chip:tell", priority=-300)]

def tell():
    return ["built for two chips", "chosen: the second, by KVPAGE_CHIP"]
"""


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "chip", "chip = chip", CHIP)
    monkeypatch.syspath_prepend(tmp_path)
    forget("chip")


def kernels(describe: str, body: str = "", **fields: object) -> PluginRegistry:
    """A registry with one kernel whose record names ``describe``."""
    record = f"LinearKernelRecord(name='k', factory='k:K', describe={describe!r}, **{fields!r})"
    source = f"{body}\n@hookimpl\ndef kvpage_linear_kernels():\n    return [{record}]\n"
    return PluginRegistry([module(source)], entry_points=False)


def test_collect_env_shows_what_a_plugin_says_once_for_all_its_records(
    chip: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect-env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["descriptions"]
    assert told["chip, chip-linear"] == ["built for two chips", "chosen: the second, by KVPAGE_CHIP"]
    assert main(["collect-env"]) == 0
    assert "  chip, chip-linear:\n    built for two chips\n" in capsys.readouterr().out


def test_explain_shows_what_a_plugin_says(chip: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "explain", "demo"]) == 0
    assert "chip, chip-linear says:\n  built for two chips\n" in capsys.readouterr().out
    assert main(["plugins", "explain", "demo", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["descriptions"]["chip, chip-linear"][0] == "built for two chips"
    )


def test_a_record_that_describes_nothing_says_nothing() -> None:
    assert PluginRegistry(entry_points=False).descriptions() == {}


def test_what_cannot_be_described_says_why_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dumb.py").write_text("def tell():\n    raise OSError('no driver')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forget("dumb")
    assert "dumb:tell raised OSError: no driver" in kernels("dumb:tell").descriptions()["k"][0]
    assert "kvpage_nowhere" in kernels("kvpage_nowhere:tell").descriptions()["k"][0]
    lacking = kernels("dumb:tell", needs=("kvpage_nowhere",), install="pip install chip").descriptions()
    assert lacking == {"k": ("needs pip install chip",)}


def test_text_with_several_lines_is_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talkative.py").write_text("def tell():\n    return 'one\\ntwo'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forget("talkative")
    assert kernels("talkative:tell").descriptions() == {"k": ("one", "two")}


def test_a_description_is_named_as_a_factory_is() -> None:
    with pytest.raises(PluginError, match="it must look like 'package"):
        LinearKernelRecord(name="k", factory="k:K", describe="tell me")
