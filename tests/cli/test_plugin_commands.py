"""What was found, what is chosen and why, does it compute right; and the facts of this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvpage.api.attention import AttentionBatch, AttentionLayer
from kvpage.builtin.reference_attention import ReferenceAttention
from kvpage.cli.bench import percentile
from kvpage.cli.main import main
from kvpage.testing.attention import short_check


def test_list_names_plugins_and_what_they_register(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == main(["plugins", "list"]) == 0
    out = capsys.readouterr().out
    assert "builtin (kvpage" in out
    assert "attention backend" in out
    assert main(["plugins", "list", "--json"]) == 0
    builtin = json.loads(capsys.readouterr().out)[0]
    assert {"kind": "model", "name": "llama"}.items() <= builtin["records"][1].items()


def test_explain_says_which_backend_and_why(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "explain", checkpoint, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "head dim 8" in out
    assert "bfloat16" in out
    assert "reference: chosen" in out


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
    assert "reference lacks KV dtype int8" in capsys.readouterr().err


def test_check_passes_the_reference_in_every_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"reference: output equals the float64 oracle [{dtype}]: passed" in lines
    assert any(": skipped: ReferenceAttention does not claim KV dtype int8" in line for line in lines)
    assert not any(": failed" in line for line in lines)


def test_check_refuses_a_name_that_is_no_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "check", "nothing"]) == 2
    assert "known: " in capsys.readouterr().err


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
