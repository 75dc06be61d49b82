"""kvpage plan says of a quantized checkpoint what stays packed, what does not, and what its bytes will be."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvpage.api.quant import GroupedInt
from kvpage.cli.main import main
from kvpage.config import EngineOptions
from kvpage.engine.held import holder, planned_holding
from kvpage.engine.quantization import find_scheme
from kvpage.engine.source import define_model, find_model, open_weights
from kvpage.loading.memory import Arena
from kvpage.loading.weights import load_weights
from kvpage.plugins import PluginRegistry
from kvpage.plugins.selection import choose_kernels

DATA = Path(__file__).parent.parent / "data" / "quant"
WRITER = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "quantized_models.py"))
WHOLE = [
    "awq-gemm-g32", "bnb-int8", "bnb-nf4-dq", "ct-fp8-dynamic", "ct-w4a16-sym-g32", "ct-w8a8-int8-dyn", "fp8-block-hf",
    "gguf-q4_0/model.gguf", "gguf-q4_k-mix/model.gguf", "gguf-q8_0/model.gguf", "gptq-4bit-g32-asym-actorder",
    "gptq-4bit-g32-sym",
]  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], name: str, *flags: str) -> str:
    main(["plan", str(DATA / name), *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", WHOLE)
def test_the_planned_bytes_are_those_that_loading_takes(name: str) -> None:
    check_planned_bytes(DATA / name)


@pytest.mark.parametrize("name", sorted(WRITER["SAFETENSORS"]))
def test_parameters_that_share_a_matrix_are_planned_as_they_are_held(name: str, tmp_path: Path) -> None:
    """Phi-3's q, k and v: each has the permutation or the table that is stored once."""
    config = transformers.Phi3Config(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    check_planned_bytes(WRITER["make"](tmp_path / "phi3", tmp_path, name))


def check_planned_bytes(path: Path) -> None:
    options, registry = EngineOptions(model=str(path)), PluginRegistry()
    source = find_model(options, registry)
    definition, _ = define_model(options, source, registry)
    choice = find_scheme(options, source.config, registry)
    assert choice is not None
    view = open_weights(options, source, definition)
    hold = holder(list(choose_kernels(registry.linear_kernels())[0].values()), "cpu", "bfloat16")
    loaded = load_weights(
        definition, view, dtype=torch.bfloat16, device="cpu", arena=Arena(), scheme=choice.open(view),
        hold=hold,
    )  # fmt: skip
    holding = planned_holding(options, registry)
    assert holding is not None
    held = holding("cpu", "bfloat16", 1)
    assert len(held) >= 14
    for parameter, weight in held.items():
        assert weight.nbytes == loaded.weights[parameter].nbytes, parameter


def test_what_stays_packed_is_said_with_its_bytes_and_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "gptq-4bit-g32-asym-actorder", "--memory", "8GB", "--device", "cpu")
    assert "14 matrices of 4-bit integers, groups of 32, zero points, act-order" in out
    assert "stay packed, kernel cpu" in out


def test_where_no_kernel_computes_a_form_its_plain_bytes_are_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = plan(capsys, "gptq-4bit-g32-sym", "--gpu", "8GB", "--dtype", "bfloat16")
    assert "14 matrices of 4-bit integers, groups of 32" in out
    assert "dequantized to bfloat16 at load: no kernel here computes them packed" in out


def test_ranks_whose_share_ends_within_a_group_cut_plain_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--memory", "8GB", "--device", "cpu", "-tp", "2")
    ordered = plan(capsys, "gptq-4bit-g32-asym-actorder", *flags)
    assert "4 matrices of 4-bit integers, groups of 32, zero points, act-order" in ordered
    assert "dequantized to bfloat16 and then cut: a rank's share does not end where its groups do" in ordered
    assert "and then cut" not in plan(capsys, "gptq-4bit-g32-sym", *flags)


def test_the_numbers_are_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(plan(capsys, "awq-gemm-g32", "--memory", "8GB", "--json"))
    assert found["quantization"] == "awq"
    (line,) = found["held"]
    assert line["matrices"] == 14
    assert line["kernel"] == "cpu"


@pytest.mark.parametrize("int8_activations", [True, False])
def test_rounding_of_activations_can_be_turned_off(int8_activations: bool) -> None:
    options = EngineOptions(
        model=str(DATA / "gptq-4bit-g32-sym"), quantization_config={"int8_activations": int8_activations}
    )
    registry = PluginRegistry()
    choice = find_scheme(options, find_model(options, registry).config, registry)
    assert choice is not None
    hold = holder(
        list(choose_kernels(registry.linear_kernels())[0].values()),
        "cpu",
        "bfloat16",
        int8_activations=choice.int8_activations,
    )
    held = hold(
        GroupedInt(
            codes=torch.zeros(32, 32, dtype=torch.uint8),
            scales=torch.ones(32, 2),
            group=32,
            activation="per-group",
        )
    )
    assert isinstance(held, GroupedInt)
    assert held.activation == ("per-group" if int8_activations else "none")


def test_a_plan_refuses_what_an_engine_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(DATA / "gptq-4bit-g32-sym", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "qzeros' should have shape [2, 16]" in said
    assert "found [4, 16]" in said
    assert "quantization_config and weights are not of one checkpoint" in said, (
        "the file's key, not a flag's name"
    )
