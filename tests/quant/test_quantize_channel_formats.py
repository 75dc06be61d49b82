"""``kvpage quantize --method int8`` and ``fp8``: what they write is compressed-tensors', and means what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvpage import CheckpointError, Engine, SamplingParams
from kvpage.testing import dequantize_checkpoint
from kvpage_quantize.command import run
from kvpage_quantize.safetensors_files import piece_of, write_safetensors
from tiny_checkpoint import write_checkpoint

VECTORS = Path(__file__).parents[1] / "data" / "quant"
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
VECTOR_OF = {"int8": "ct-w8a8-int8-dyn", "fp8": "ct-fp8-dynamic"}
METHODS = sorted(CODES)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", seed=5)


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    for method in METHODS:
        assert run([str(plain), "--method", method, "--out", str(root / method)]) == 0
    return {method: root / method for method in METHODS}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in float32, a weight with a scale multiplied by it: the format's definition."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: tensor.float() * tensors[f"{name}_scale"].float()
        if f"{name}_scale" in tensors
        else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }


@pytest.mark.parametrize("method", METHODS)
def test_tensors_and_config_are_those_that_compressed_tensors_writes(
    method: str, plain: Path, quantized: dict[str, Path]
) -> None:
    vector = VECTORS / VECTOR_OF[method]
    theirs = json.loads((vector / "config.json").read_text())["quantization_config"]
    ours = json.loads((quantized[method] / "config.json").read_text())["quantization_config"]
    assert ours == theirs
    before = load_file(plain / "model.safetensors")
    after = load_file(quantized[method] / "model.safetensors")
    with safe_open(vector / "model.safetensors", "pt") as file:
        theirs_too = list(file.keys())
    assert sorted(after) == sorted(theirs_too)
    for name, tensor in before.items():
        if name.removesuffix(".weight").endswith(LINEAR):
            assert (after[name].dtype, after[name].shape) == (CODES[method], tensor.shape)
            assert after[f"{name}_scale"].shape == (tensor.shape[0], 1)
            assert after[f"{name}_scale"].dtype == tensor.dtype
        else:
            assert after[name].equal(tensor), name


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_the_nearest_that_its_scale_allows(
    method: str, plain: Path, quantized: dict[str, Path]
) -> None:
    before, after = load_file(plain / "model.safetensors"), load_file(quantized[method] / "model.safetensors")
    for name in (name for name in before if f"{name}_scale" in after):
        weight, scale = before[name].double(), after[f"{name}_scale"].double()
        largest = weight.abs().amax(1, keepdim=True)
        steps = 127.5 if method == "int8" else 448
        torch.testing.assert_close(scale, largest / steps, rtol=1e-6, atol=0)
        grid = torch.arange(-128, 128, dtype=torch.float64)
        if method == "fp8":
            every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).double()
            grid = every[every.isfinite()]
        best = ((weight / scale).unsqueeze(-1) - grid).abs().amin(-1)
        found = (weight / scale - after[name].double()).abs()
        assert bool((found <= best + 1e-4).all()), name


@pytest.mark.parametrize("method", METHODS)
def test_the_loader_reads_it_bit_for_bit(method: str, quantized: dict[str, Path]) -> None:
    expected = decoded(quantized[method])
    found = dict(dequantize_checkpoint(quantized[method]))
    assert {name for name in found if name.removesuffix(".weight").endswith(LINEAR)} == {
        name for name in expected if name.removesuffix(".weight").endswith(LINEAR)
    }
    for name, weight in found.items():
        assert weight.equal(expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_greedy_output_is_transformers_with_the_dequantized_weights(
    method: str, plain: Path, quantized: dict[str, Path]
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    model.load_state_dict(decoded(quantized[method]))
    prompt = [1, 40, 77, 123, 9]
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    with Engine(str(quantized[method]), dtype="float32") as engine:
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        found = engine.generate([prompt], params)[0].outputs[0].token_ids
    assert list(found) == expected[0, len(prompt) :].tolist()


def test_everything_beside_the_weights_comes_along(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("as you like")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    assert run([str(source), "--method", "int8", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "quantization_config"} == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_have_the_dtype_of_the_checkpoint_and_a_dead_output_stays_zero(
    dtype: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=dtype)
    tensors = {
        name: tensor.to(getattr(torch, dtype))
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3] = 0
    save_file(tensors, source / "model.safetensors")
    assert run([str(source), "--method", "int8", "--out", str(tmp_path / "out")]) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[f"{name}_scale"].dtype is getattr(torch, dtype)
    assert bool((after[f"{name}_scale"] > 0).all())
    assert not after[name][3].any()


def test_a_damaged_weight_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][2, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}.*not a number"):
        run([str(source), "--method", "fp8", "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_large_checkpoint_is_written_in_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.randn(10, 10) for index in range(5)}
    pieces = [piece_of({name: tensor}) for name, tensor in tensors.items()]
    assert write_safetensors(tmp_path, pieces, shard_bytes=900) == 2000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    for name, tensor in tensors.items():
        assert load_file(tmp_path / index["weight_map"][name])[name].equal(tensor)
