"""Whatever is wrong with a quantized checkpoint, an engine refuses it with CheckpointError that says where and what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvpage import CheckpointError, Engine
from kvpage.api.quant import QuantScheme
from kvpage.errors import KvpageError
from kvpage.plugins import PluginRegistry
from kvpage.plugins.factories import load_class
from kvpage.testing.checkpoints import QuantSample, linear, read_folder

DATA = Path(__file__).parent.parent / "data" / "quant"
GPTQ, AWQ = "gptq-4bit-g32-sym", "awq-gemm-g32"
K_PROJ = "model.layers.0.self_attn.k_proj"
LAYERS = sorted(file.parent.name for file in DATA.glob("*-layer/config.json"))


def copied(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    return folder


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Engine(folder, skip_tokenizer_init=True, num_kv_blocks=16, **options).close()
    return str(caught.value)


def runs(folder: Path) -> None:
    with Engine(folder, skip_tokenizer_init=True, num_kv_blocks=16) as engine:
        engine.generate([{"prompt_token_ids": [1, 2, 3]}], progress=False)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = weights_of(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    file = weights_of(folder)
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is truncated" in refused(folder)


def test_a_header_that_is_longer_than_the_file(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    file = weights_of(folder)
    file.write_bytes((1 << 40).to_bytes(8, "little") + file.read_bytes()[8:])
    said = refused(folder)
    assert str(file) in said
    assert str(1 << 40) in said


def test_a_tensor_that_is_named_twice(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    file = weights_of(folder)
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].decode().rstrip()
    entry = json.dumps(json.loads(header)[f"{K_PROJ}.scales"])
    twice = f'{header[:-1]},"{K_PROJ}.scales":{entry}}}'.encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + data[end:])
    said = refused(folder)
    assert f"{K_PROJ}.scales" in said
    assert "twice" in said


@pytest.mark.parametrize(
    ("shard", "message"),
    [("gone.safetensors", "which is missing"), ("../other.safetensors", "shards lie beside the index")],
)
def test_an_index_that_names_a_file_that_is_not_there(tmp_path: Path, shard: str, message: str) -> None:
    folder = copied(tmp_path, GPTQ)
    file = weights_of(folder)
    names = load_file(file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(names, file.name), "lm_head.weight": shard}}))
    said = refused(folder)
    assert message in said
    assert str(index) in said


def test_shards_of_two_checkpoints(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    file = weights_of(folder)
    tensors, others = load_file(file), load_file(weights_of(DATA / AWQ))
    mine = {name: tensor for name, tensor in tensors.items() if not name.startswith(K_PROJ)}
    theirs = {name: tensor for name, tensor in others.items() if name.startswith(K_PROJ)}
    save_file(mine, folder / "a.safetensors")
    save_file(theirs, folder / "b.safetensors")
    file.unlink()
    places = {**dict.fromkeys(mine, "a.safetensors"), **dict.fromkeys(theirs, "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    said = refused(folder)
    assert "b.safetensors" in said
    assert f"{K_PROJ}.qweight" in said


def test_a_matrix_that_is_stored_quantized_and_plain(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    change_tensors(folder, lambda tensors: tensors.update({f"{K_PROJ}.weight": torch.zeros(64, 128)}))
    said = refused(folder)
    assert K_PROJ in said
    assert "both" in said


def test_a_method_that_nobody_reads_lists_those_that_are(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    change_config(folder, quantization_config={"quant_method": "exl3", "bits": 4})
    said = refused(folder)
    for name in ("exl3", "gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "gguf", "torchao"):
        assert name in said


def test_packed_tensors_without_a_config_that_says_so(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    (folder / "quantize_config.json").unlink()
    change_config(folder, quantization_config=None)
    said = refused(folder)
    assert "qweight" in said
    assert "quantization_config" in said
    assert str(weights_of(folder)) in said


@pytest.mark.parametrize("name", ["awq", "int8", "int4", "gguf", "nonsense"])
def test_a_name_that_differs_from_what_the_checkpoint_states(tmp_path: Path, name: str) -> None:
    said = refused(DATA / GPTQ, quantization=name)
    assert f"quantization={name!r}" in said
    assert "gptq" in said


@pytest.mark.parametrize("name", ["gptq", "gptq_marlin"])
def test_a_name_of_what_the_checkpoint_states_is_no_contradiction(name: str) -> None:
    with Engine(DATA / GPTQ, quantization=name, skip_tokenizer_init=True, num_kv_blocks=16) as engine:
        assert engine.config.dtype == "bfloat16"


def test_auto_gptqs_own_config_file_and_index_name_are_read(tmp_path: Path) -> None:
    folder = copied(tmp_path, GPTQ)
    change_config(folder, quantization_config=None)
    file = weights_of(folder)
    shard = file.rename(folder / "gptq_model-4bit-32g-00001-of-00001.safetensors")
    (folder / "gptq_model-4bit-32g.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(shard), shard.name)})
    )
    runs(folder)


def test_autoawqs_own_config_file_is_read(tmp_path: Path) -> None:
    folder = copied(tmp_path, AWQ)
    change_config(folder, quantization_config=None)
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own))
    runs(folder)


SCHEMES = PluginRegistry().quantization_schemes()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [way for key, inner in value.items() for way in keys_of(inner, (*path, key))]
    return found


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    return {**value, path[0]: replaced(value[path[0]], path[1:], other)}


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_config_with_any_value_anywhere_is_read_or_refused(name: str, data: st.DataObject) -> None:
    config, tensors = read_folder(DATA / name)
    way = data.draw(st.sampled_from([way for way in keys_of(dict(config)) if way != ("quant_method",)]))
    changed = replaced(dict(config), way, data.draw(JSON))
    sample = QuantSample(config=changed, tensors=tensors, linears=())
    record = next(record for record in SCHEMES if config["quant_method"] in record.methods)
    spec = linear(K_PROJ, 64, 128)
    try:
        scheme: QuantScheme = load_class(record, QuantScheme).from_checkpoint(changed, sample.view())
        stated = scheme.tensors(spec, sample.view())
        shapes = {suffix: tuple(sample.tensors[f"{K_PROJ}.{suffix}"].shape) for suffix in stated}
        if stated and all(shapes[suffix] == tuple(part.shape) for suffix, part in stated.items()):
            form = scheme.to_form(spec, {suffix: tensors[f"{K_PROJ}.{suffix}"] for suffix in stated})
            assert form.shape == (64, 128)
    except KvpageError:
        pass
    except KeyError as missing:  # a tensor that the loader finds missing
        assert str(missing.args[0]).startswith(K_PROJ)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (GPTQ, "bits", 5), (GPTQ, "checkpoint_format", "marlin"), (AWQ, "version", "gemm3"),
        ("ct-w4a16-sym-g32", "sparsity_config", {"format": "sparse-bitmask"}), ("bnb-nf4-dq", "load_in_8bit", True),
        ("fp8-block-hf", "activation_scheme", "static"),
    ],
)  # fmt: skip
def test_a_value_of_the_config_is_named_with_its_file(
    tmp_path: Path, name: str, key: str, value: object
) -> None:
    folder = copied(tmp_path, name)
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**stated, key: value})
    said = refused(folder)
    assert said.startswith(str(folder / "config.json"))
    assert key in said


def test_two_groups_for_a_module_are_named_with_a_file(tmp_path: Path) -> None:
    folder = copied(tmp_path, "ct-w4a16-sym-g32")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = stated["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*k_proj"]}
    change_config(folder, quantization_config=stated)
    said = refused(folder)
    assert str(weights_of(folder)) in said
    assert "group_0, group_1" in said
