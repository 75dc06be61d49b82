"""``kvpage quantize``: its flags, what it refuses, its calibration text, its report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvpage import CheckpointError, ConfigError, KvpageError, demo
from kvpage.cli.main import main
from kvpage.flags.parser import UsageError
from kvpage_quantize import gptq_package
from kvpage_quantize.calibration import calibration_tokens, read_documents
from kvpage_quantize.command import awq_settings, calibration_settings, gptq_settings, make_parser, run
from kvpage_quantize.decoder_layers import (
    check_linear_modules,
    decoder_layers,
    linear_groups,
    load_model,
    record_calls,
)
from kvpage_quantize.gptq import output_error
from kvpage_quantize.settings import AwqSettings, CalibrationSettings, GptqSettings
from kvpage_quantize.source import open_source
from tiny_checkpoint import write_checkpoint

VECTORS = Path(__file__).parents[1] / "data" / "quant"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=5)


def test_the_command_is_found_and_its_help_needs_no_torch() -> None:
    code = (
        "import sys; from kvpage.cli.main import main; status = main(['quantize', '--help']); "
        "sys.exit(status or bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--group-size" in done.stdout


def test_flags_that_are_not_typed_have_the_settings_defaults() -> None:
    namespace = make_parser().parse_arguments(["demo", "--method", "gptq", "--out", "x"])
    assert gptq_settings(namespace) == GptqSettings()
    assert awq_settings(namespace) == AwqSettings()
    assert calibration_settings(namespace) == CalibrationSettings()


def test_flags_that_are_typed_reach_the_settings() -> None:
    typed = [
        "demo", "--out", "x", "--method", "gptq", "--bits", "3", "--group-size", "-1", "--desc-act", "--no-sym",
        "--damp-percent", "0.05", "--calibration", "text.txt", "--calibration-samples", "1k", "--sequence-length", "64",
        "--seed", "7",
    ]  # fmt: skip
    namespace = make_parser().parse_arguments(typed)
    assert gptq_settings(namespace) == GptqSettings(
        bits=3, group_size=-1, desc_act=True, sym=False, damp_percent=0.05
    )
    assert calibration_settings(namespace) == CalibrationSettings(
        file=Path("text.txt"), samples=1000, length=64, seed=7
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "int8", "--bits", "4"], "--bits is of gptq; --method int8 has none"),
        (["--method", "awq", "--desc-act"], "--desc-act is of gptq; --method awq has none"),
        (["--method", "fp8", "--calibration", "x"], "--calibration is of gptq and awq; --method fp8 has none"),
        (["--method", "gptq", "--bits", "5"], "--bits must be one of 2, 3, 4, 8, got 5"),
        (["--method", "gptq", "--group-size", "0"], "--group-size must be at least 1, or -1 for a whole row, got 0"),
        (["--method", "awq", "--group-size", "-1"], "--group-size must be at least 1, got -1"),
        (["--method", "gptq", "--damp-percent", "1"], "--damp-percent must be between 0 and 1, got 1"),
        (["--method", "awq", "--calibration-samples", "0"], "--calibration-samples must be at least 1, got 0"),
        (["--method", "int2"], "invalid choice: 'int2'"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], says: str, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        run([str(plain), "--out", str(tmp_path / "out"), *flags])
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_without_force(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; give another folder, or --force"):
        run([str(plain), "--method", "int8", "--out", str(out)])
    assert run([str(plain), "--method", "int8", "--out", str(out), "--force"]) == 0
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").is_file()


def test_the_source_itself_is_never_the_output(plain: Path) -> None:
    before = (plain / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the checkpoint that is quantized"):
        run([str(plain), "--method", "int8", "--out", str(plain / ".." / plain.name), "--force"])
    assert (plain / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("vector", ["gptq-4bit-g32-sym", "awq-gemm-g32", "ct-fp8-dynamic", "bnb-nf4-dq"])
def test_a_quantized_checkpoint_is_not_quantized_again(vector: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantized already"):
        run([str(VECTORS / vector), "--method", "int8", "--out", str(tmp_path / "out")])


def test_quantized_tensors_are_seen_where_the_config_does_not_speak_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((VECTORS / "awq-gemm-g32" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    (folder / "model.safetensors").write_bytes((VECTORS / "awq-gemm-g32" / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"is of a quantized checkpoint, though config\.json does not say"
    ):
        run([str(folder), "--method", "int8", "--out", str(tmp_path / "out")])


def test_weights_that_compressed_tensors_has_no_place_for_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"stored \[in, out\].*--quantization int8"):
        run([str(tmp_path / "gpt2"), "--method", "int8", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("method", "package"), [("gptq", "auto_gptq"), ("awq", "awq")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    method: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.util.find_spec

    def without(name: str, package_: str | None = None) -> Any:
        return None if name == package else real(name, package_)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    status = main(["quantize", "demo", "--method", method, "--out", str(tmp_path / "out"), "--calibration-samples", "1"])  # fmt: skip
    assert status == 2
    assert f"pip install 'kvpage[{method}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_says_how_far_each_layer_is(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "int8", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "report.json")]
    assert run([str(plain), *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"], report["method"], len(report["layers"])) == (str(plain), "int8", 14)
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "out"))
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in after.values())
    for row in report["layers"]:
        name = f"{row['name']}.weight"
        kept = after[name].float() * after[f"{name}_scale"].float()
        expected = float((kept - before[name]).norm() / before[name].norm())
        assert row["weight"] == pytest.approx(expected, rel=1e-3)
    printed = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj" in printed
    assert "mean" in printed


def test_documents_are_blocks_between_blank_lines_or_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one\ntwo", "three"]
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n\\ntwo"}\n\n{"text": "three", "id": 4}\n')
    assert read_documents(tmp_path / "a.jsonl") == ["one\n\ntwo", "three"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\n{"txt": 1}\n', 'line 2: expected an object with a "text"'),
        (b"[1]\n", 'line 1: expected an object with a "text"'),
        (b"{\n", "line 1 is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"text": "a"}\n', "at least 16 are needed"),
    ],
)
def test_a_calibration_file_that_is_none_is_refused(
    content: bytes, says: str, plain: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(content)
    with pytest.raises(KvpageError) as caught:
        calibration_tokens(open_source(str(plain)), CalibrationSettings(file=path, samples=2, length=32))
    assert says in str(caught.value)


def test_calibration_text_of_a_file_is_its_documents_one_after_another(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"block {number} of the pool" for number in range(40)))
    source = open_source(str(plain))
    settings = CalibrationSettings(file=path, samples=4, length=16, seed=1)
    blocks = calibration_tokens(source, settings)
    assert [len(block) for block in blocks] == [16] * 4
    assert blocks[0][0] == 1, "a document begins with BOS"
    assert blocks == calibration_tokens(source, settings)
    with pytest.raises(ConfigError, match="beyond the model's context of 512"):
        calibration_tokens(source, CalibrationSettings(file=path, length=513))


def test_the_bundled_model_is_calibrated_on_the_text_it_was_trained_for() -> None:
    blocks = calibration_tokens(open_source("demo"), CalibrationSettings(samples=3, length=40, seed=2))
    assert [len(block) for block in blocks] == [40] * 3
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(demo.path() / "tokenizer.json")).decode(
        blocks[0], skip_special_tokens=False
    )
    assert text.startswith("<|bos|>")


def test_without_a_file_another_model_writes_its_own_text(plain: Path) -> None:
    source = open_source(str(plain))
    settings = CalibrationSettings(samples=3, length=24, seed=3)
    blocks = calibration_tokens(source, settings)
    assert [len(block) for block in blocks] == [24] * 3
    assert blocks == calibration_tokens(source, settings), "the seed decides"
    assert blocks != calibration_tokens(source, CalibrationSettings(samples=3, length=24, seed=4))


def test_layers_are_called_as_the_whole_model_calls_them(plain: Path) -> None:
    model = load_model(open_source(str(plain)))
    name, layers = decoder_layers(model)
    assert (name, len(layers)) == ("model.layers", 2)
    tokens = [[1, 5, 9, 33], [7, 8, 2, 3]]
    hidden, calls = record_calls(model, list(layers), tokens)
    with torch.no_grad():
        for sequence, state, each in zip(tokens, hidden, calls, strict=True):
            for layer, call in zip(layers, each, strict=True):
                state = call.run(layer, state)
            expected = model.model(torch.tensor([sequence])).last_hidden_state
            torch.testing.assert_close(model.model.norm(state), expected)


def test_linear_modules_that_share_their_input_are_solved_together(plain: Path) -> None:
    model = load_model(open_source(str(plain)))
    _, layers = decoder_layers(model)
    hidden, calls = record_calls(model, list(layers), [[1, 5, 9, 33]])
    with torch.no_grad():
        groups = linear_groups(layers[0], calls[0][0], hidden[0], "model.layers.0")
    assert [sorted(name.rpartition(".")[2] for name in group) for group in groups] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


def test_a_group_size_that_does_not_divide_names_the_layer_and_one_that_does(plain: Path) -> None:
    _, layers = decoder_layers(load_model(open_source(str(plain))))
    with pytest.raises(KvpageError, match=r"--group-size 128 does not divide the 32 inputs of model.layers.0.self_attn.\w+: try --group-size 32"):  # fmt: skip
        check_linear_modules(list(layers), "model.layers", group_size=128, inputs=32, outputs=32)
    with pytest.raises(KvpageError, match="k_proj has 32 inputs and 16 outputs: this format packs multiples of 32 and 32"):  # fmt: skip
        check_linear_modules(list(layers), "model.layers", group_size=32, inputs=32, outputs=32)


def test_the_output_error_is_that_of_the_outputs() -> None:
    torch.manual_seed(0)
    inputs, weight, other = torch.randn(50, 12), torch.randn(7, 12), torch.randn(7, 12)
    expected = ((inputs @ (other - weight).t()).norm() / (inputs @ weight.t()).norm()).item()
    assert output_error(other - weight, weight, inputs.t() @ inputs) == pytest.approx(expected, rel=1e-4)


def test_the_stubs_for_auto_gptq_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of auto-gptq's layout, whose ``__init__`` would fail as the real one does."""
    root = tmp_path / "auto_gptq"
    parts = {
        "__init__.py": "raise ImportError('no_init_weights')",
        "quantization/gptq.py": (
            "import torch\nfrom .quantizer import Quantizer\ntorch.backends.cudnn.allow_tf32 = False\n"
            "class GPTQ:\n    def wait(self):\n        torch.cuda.synchronize()\n        return torch.ones(1)\n"
        ),
        "quantization/quantizer.py": "class Quantizer: pass",
        "nn_modules/qlinear/qlinear_cuda.py": "class QuantLinear: pass",
    }
    for name, text in parts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.1")
    kept = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "auto_gptq.host", kept)
    before = torch.backends.cudnn.allow_tf32
    package = gptq_package.load_package()
    assert package.solver().wait().equal(torch.ones(1)), "without CUDA it does not wait for it"
    assert {name for name in sys.modules if name.startswith("auto_gptq")} == {"auto_gptq.host"}
    assert torch.backends.cudnn.allow_tf32 == before
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    with pytest.raises(KvpageError, match=r"needs auto-gptq 0\.7\.1, found 0\.6\.0"):
        gptq_package.load_package()
