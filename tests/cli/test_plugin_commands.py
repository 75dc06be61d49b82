"""What was found, what is chosen and why, does it compute right; and the facts of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from installed_plugins import forget, install, policy_plugin
from kvpage.api.attention import AttentionBatch, AttentionLayer
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.cli.bench import percentile
from kvpage.cli.main import main
from kvpage.plugins import PluginRegistry
from kvpage.testing.attention import short_check


def test_list_names_plugins_and_what_they_register(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == main(["plugins", "list"]) == 0
    out = capsys.readouterr().out
    assert "builtin (kvpage" in out
    assert "attention backend" in out
    assert main(["plugins", "list", "--json"]) == 0
    builtin = json.loads(capsys.readouterr().out)[0]
    assert ("model", "llama") in {(record["kind"], record["name"]) for record in builtin["records"]}


@pytest.fixture
def no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installation without a compiler: the native backend is registered, and nothing can be made by it."""
    monkeypatch.setenv("KVPAGE_CPU_LIBRARY", "/nonexistent")


@pytest.mark.usefixtures("no_native_library")
def test_explain_says_which_backend_and_why(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "explain", checkpoint, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "head dim 8" in out
    assert "bfloat16" in out
    assert "attention backend:\n  reference: chosen, by priority (priority -100)" in out
    assert "decoder backend:\n  torch: chosen, by priority (priority -100)" in out
    assert "checkpoint reader:\n  safetensors: chosen" in out
    assert "quantization scheme:\n  none: the checkpoint is plain" in out
    assert "linear kernel for plain weights:\n  torch: chosen, the first that supports plain weights" in out
    assert "sampling kernel:\n  torch: chosen, by priority (priority -100)" in out
    assert main(["plugins", "explain", checkpoint, "--json", "-q", "int8"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["need"]["head_dims"] == [8]
    chosen = {choice["kind"]: choice["chosen"] for choice in facts["choices"]}
    assert chosen == {
        "attention backend": "reference", "decoder backend": "torch", "checkpoint reader": "safetensors",
        "quantization scheme": "int8", "linear kernel for weights of scheme int8": "",
        "linear kernel for plain weights": "torch", "sampling kernel": "torch",
    }  # fmt: skip
    of_scheme = next(choice for choice in facts["choices"] if "of scheme" in choice["kind"])
    assert of_scheme["why"].startswith(
        "chosen when the weights are read: the first that supports their form, of "
    )
    assert of_scheme["others"] == []


BACKENDS = """
@hookimpl
def kvpage_attention_backends():
    return [AttentionBackendRecord(name="fast", factory="kvpage_no_chip:Attention", priority=9, summary="on a chip",
                                   needs=("kvpage_no_chip",), install="pip install 'kvpage-chip[driver]'"),
            AttentionBackendRecord(name="absent", factory="kvpage_no_chip:Attention", priority=8),
            AttentionBackendRecord(name="spare", factory="kvpage_no_chip:Attention", priority=-200)]
@hookimpl
def kvpage_decoder_backends():
    return [DecoderBackendRecord(name="whole", factory="kvpage.models.decoder:TorchDecoder")]
@hookimpl
def kvpage_cli_commands():
    return [CliCommandRecord(name="plan", factory="chip_plugin:shout", help="takes the place of kvpage plan"),
            CliCommandRecord(name="chip_info", factory="chip_plugin:shout", help="about the chip"),
            CliCommandRecord(name="chip-test", factory="chip_plugin:shout", help="of the chip", needs=("kvpage_no_chip",))]
def shout(arguments):
    print("LOUD", *arguments)
    return 7
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Distributions of every standing: active, failed, without what it needs, left out."""
    install(tmp_path, "kvpage-chip", "chip = chip_plugin", BACKENDS, version="2.5")
    install(
        tmp_path, "kvpage-late", "late = late_plugin", "KVPAGE_API_VERSION = '1.9'\n" + policy_plugin("late")
    )
    install(tmp_path, "kvpage-part", "part = kvpage_no_part [extra]", None)
    install(tmp_path, "kvpage-out", "out = out_plugin", policy_plugin("out"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KVPAGE_PLUGINS", "-out")
    yield
    forget("chip_plugin", "late_plugin", "out_plugin")


@pytest.mark.usefixtures("installed")
def test_list_tells_of_every_plugin_where_it_is_from_and_why_it_is_not_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plugins", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "chip (kvpage-chip 2.5): active" in lines
    late = "late needs kvpage api 1.9, this is 1.0: pip install -U kvpage"
    assert f"late (kvpage-late 1.0, kvpage api 1.9): failed: {late}" in lines
    assert "part (kvpage-part 1.0): unavailable: needs pip install 'kvpage-part[extra]'" in lines
    assert "out (kvpage-out 1.0): disabled: left out by KVPAGE_PLUGINS: -out" in lines
    fast = next(i for i, line in enumerate(lines) if line.split()[:3] == ["attention", "backend", "fast"])
    assert lines[fast].endswith("priority 9: on a chip")
    assert lines[fast + 1].strip() == "needs pip install 'kvpage-chip[driver]'"
    assert lines[fast + 3].strip() == "there is no module kvpage_no_chip to make it"
    assert main(["plugins", "list", "--json"]) == 0
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert (found["late"]["status"], found["late"]["api_version"], found["late"]["records"]) == (
        "failed",
        "1.9",
        [],
    )
    assert found["chip"]["records"][0]["unavailable"] == "needs pip install 'kvpage-chip[driver]'"


@pytest.mark.usefixtures("installed", "no_native_library")
def test_explain_has_a_reason_for_each_one_that_is_not_taken(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "explain", checkpoint, "--json"]) == 0
    choices = {choice["kind"]: choice for choice in json.loads(capsys.readouterr().out)["choices"]}
    attention = dict(choices["attention backend"]["others"])
    assert attention["fast"] == "fast needs pip install 'kvpage-chip[driver]'"
    assert "kvpage_no_chip:Attention cannot be imported" in attention["absent"]
    assert attention["spare"] == "there is no module kvpage_no_chip to make it"
    assert choices["decoder backend"]["chosen"] == "whole"
    decoders = dict(choices["decoder backend"]["others"])
    assert decoders["torch"] == "it follows if whole declines the weights"
    assert all(choice["chosen"] not in dict(choice["others"]) for choice in choices.values())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("late", 1, "late needs kvpage api 1.9"),
        ("part", 1, "needs pip install 'kvpage-part[extra]'"),
        ("out", 1, "left out by KVPAGE_PLUGINS"),
        ("absent", 1, "absent: cannot be loaded"),
        ("chip", 1, "fast: cannot be loaded: fast needs pip install"),
    ],
)
def test_check_says_no_to_what_cannot_be_used(
    name: str, status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", name]) == status
    assert says in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
def test_a_command_of_a_plugin_cannot_take_the_place_of_kvpage_s_own(
    llama_2_70b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", llama_2_70b, "--gpu", "80GB"]) != 7
    assert "LOUD" not in capsys.readouterr().out
    assert main(["--help"]) == 0
    shown = capsys.readouterr()
    assert "takes the place" not in shown.out
    assert "the command 'plan' of a plugin is left out" in shown.err
    assert "about the chip" in shown.out
    for name in ("chip_info", "chip-info"):
        assert main([name, "x"]) == 7
        assert capsys.readouterr().out == "LOUD x\n"
    assert main(["chip-test"]) == 2
    assert "chip-test needs kvpage_no_chip, which is not installed" in capsys.readouterr().err


def test_explain_says_what_the_named_backend_lacks(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "plugins",
        "explain",
        checkpoint,
        "--attention-backend",
        "reference",
        "--kv-cache-dtype",
        "int8",
    ]
    assert main(arguments) == 2
    assert "reference: KV dtype int8" in capsys.readouterr().err


def test_check_passes_the_reference_in_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"reference: output equals the float64 oracle [{dtype}]: passed" in lines
    assert any(": skipped: ReferenceAttention does not claim KV dtype int8" in line for line in lines)
    assert not any(": failed" in line for line in lines)


def test_check_refuses_a_name_that_is_no_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "nothing"]) == 2
    registry = PluginRegistry()
    backends = ", ".join(record.name for record in registry.attention_backends())
    plugins = ", ".join(status.name for status in registry.statuses())
    assert "reference" in backends
    assert "builtin" in plugins
    err = capsys.readouterr().err
    assert f"known attention backends: {backends}; known plugins: {plugins}\n" in err


class ForgetsTheWindow(ReferenceAttention):
    """Wrong on purpose: every layer sees everything."""

    def attend(self, q: torch.Tensor, kv: torch.Tensor, layer: AttentionLayer, batch: AttentionBatch, plan: object,
               out: torch.Tensor) -> None:  # fmt: skip
        super().attend(q, kv, replace(layer, window=None), batch, plan, out)


class Raises(ReferenceAttention):
    """Broken on purpose."""

    def plan(self, batch: AttentionBatch) -> object:  # type: ignore[override]
        raise RuntimeError("no kernel image")


def test_check_finds_a_backend_that_computes_something_else() -> None:
    wrong = [result for result in short_check(ForgetsTheWindow, "cpu") if not result.passed]
    assert [result.case for result in wrong] == ["window [block+1]"]
    assert "first wrong value at row" in wrong[0].finding


def test_check_fails_where_the_device_is_not_there() -> None:
    [result] = short_check(ReferenceAttention, "cuda:99")
    assert not result.passed
    assert result.case == "device cuda:99"


def test_check_reports_what_a_backend_raises() -> None:
    found = {result.case: result for result in short_check(Raises, "cpu")}
    oracle = found["output equals the float64 oracle [float32]"]
    assert oracle.verdict == "failed"
    assert oracle.finding == "RuntimeError: no kernel image"


def test_collect_env_tells_versions_and_the_processor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["memory"]["total"] >= facts["memory"]["available"] > 0
    assert facts["cpu"]["cores"] >= 1
    assert facts["plugins"][0]["name"] == "builtin"
    assert main(["collect-env"]) == 0
    assert f"  version: {torch.__version__}" in capsys.readouterr().out


def test_percentiles_are_interpolated() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], percent) for percent in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile([1.0], 99) == 1.0
