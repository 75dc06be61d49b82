"""Damaged and unsupported GPTQ checkpoints are refused before anything runs: file, tensor, expected, found."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_writer import config_of, random_matrix

from kvpage import CheckpointError, Engine
from kvpage.testing.checkpoints import TensorsView, linear, read_folder, write_folder
from kvpage_gptq.scheme import Gptq

DATA = Path(__file__).parent.parent / "data" / "quant"
K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], object]


def opened(tmp_path: Path, vector: str, damage: Damage, **changes: Any) -> None:
    """Start an engine on a real checkpoint that was changed: its tensors by ``damage``, its config by ``changes``."""
    config = json.loads((DATA / vector / "config.json").read_text())
    config["quantization_config"].update(changes)
    tensors = dict(read_folder(DATA / vector)[1])
    damage(tensors)
    write_folder(tmp_path, config, tensors)
    Engine(tmp_path, dtype="float32", skip_tokenizer_init=True, num_kv_blocks=16).close()


def intact(tensors: Tensors) -> None:
    """No damage."""


def with_value(name: str, value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[5] = value

    return damage


def as_dtype(name: str, dtype: torch.dtype) -> Damage:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def shorter(name: str) -> Damage:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def without(name: str) -> Damage:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "name", "expected", "found"),
    [
        (shorter(f"{K_PROJ}.qweight"), "qweight", "[16, 64], int32", "[15, 64]"),
        (shorter(f"{K_PROJ}.qzeros"), "qzeros", "[4, 8], int32", "[3, 8]"),
        (shorter(f"{K_PROJ}.scales"), "scales", "[4, 64], float16", "[3, 64]"),
        (shorter(f"{K_PROJ}.g_idx"), "g_idx", "[128], int32", "[127]"),
        (without(f"{K_PROJ}.qweight"), "qweight", "[16, 64], int32", "is missing"),
        (without(f"{K_PROJ}.qzeros"), "qzeros", "[4, 8], int32", "is missing"),
        (without(f"{K_PROJ}.scales"), "scales", "[4, 64], float16", "is missing"),
        (without(f"{K_PROJ}.g_idx"), "g_idx", "[128], int32", "is missing"),
        (as_dtype(f"{K_PROJ}.qweight", torch.int64), "qweight", "int32", "int64"),
        (as_dtype(f"{K_PROJ}.qzeros", torch.int16), "qzeros", "int32", "int16"),
        (as_dtype(f"{K_PROJ}.g_idx", torch.int64), "g_idx", "int32", "int64"),
        (as_dtype(f"{K_PROJ}.scales", torch.float64), "scales", "float16", "float64"),
        (with_value(f"{K_PROJ}.g_idx", 4), "g_idx", "groups of 0 to 3", "found 4"),
        (with_value(f"{K_PROJ}.g_idx", -1), "g_idx", "groups of 0 to 3", "found -1"),
        (with_value(f"{K_PROJ}.scales", torch.nan), "scales", "finite numbers of at least 0", "found nan"),
        (with_value(f"{K_PROJ}.scales", torch.inf), "scales", "finite numbers of at least 0", "found inf"),
        (with_value(f"{K_PROJ}.scales", -0.5), "scales", "finite numbers of at least 0", "found -0.5"),
    ],
)
def test_a_damaged_tensor_is_named(
    tmp_path: Path, damage: Damage, name: str, expected: str, found: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, "gptq-4bit-g32-asym-actorder", damage)
    message = str(caught.value)
    assert str(tmp_path / "model.safetensors") in message
    for part in (f"'{K_PROJ}.{name}'", expected, found):
        assert part in message


def test_a_matrix_that_is_there_plain_too_is_refused(tmp_path: Path) -> None:
    plain = torch.zeros(128, 256, dtype=torch.float16)
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: '{DOWN}' is stored both quantized .* and plain"
    ):
        opened(tmp_path, "gptq-4bit-g32-sym", lambda tensors: tensors.update({f"{DOWN}.weight": plain}))


@pytest.mark.parametrize(
    ("changes", "expected", "found"),
    [({"bits": 8}, "[32, 128], int32", "[16, 128]"), ({"group_size": 64}, "[2, 16], int32", "[4, 16]")],
)
def test_a_config_of_another_checkpoint_is_told_by_the_shapes(
    tmp_path: Path, changes: dict[str, int], expected: str, found: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, "gptq-4bit-g32-sym", intact, **changes)
    for part in (str(tmp_path / "model.safetensors"), "self_attn.q_proj", expected, found):
        assert part in str(caught.value)


def test_version_2_that_is_labelled_version_1_is_named(tmp_path: Path) -> None:
    def stored_as_they_are(tensors: Tensors) -> None:
        tensors.update({name: tensor + 0x11111111 for name, tensor in tensors.items() if "qzeros" in name})

    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, "gptq-4bit-g32-sym", stored_as_they_are)
    for part in (
        "model.safetensors",
        "q_proj.qzeros'",
        "only 7",
        "found 8",
        'checkpoint_format to "gptq_v2"',
    ):
        assert part in str(caught.value)
    (tmp_path / "again").mkdir()
    opened(tmp_path / "again", "gptq-4bit-g32-sym", stored_as_they_are, checkpoint_format="gptq_v2")


def test_version_1_that_is_labelled_version_2_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'only 8.* found 7; set its checkpoint_format to "gptq"'):
        opened(tmp_path, "gptq-4bit-g32-sym", intact, checkpoint_format="gptq_v2")


def test_zero_points_that_are_not_symmetric_though_the_config_says_so_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"qzeros' should have only 7, .* found \d+; set its sym to false"
    ):
        opened(tmp_path, "gptq-4bit-g32-asym-actorder", intact, sym=True)


def test_a_dead_column_is_legal(tmp_path: Path) -> None:
    opened(tmp_path, "gptq-4bit-g32-asym-actorder", with_value(f"{K_PROJ}.scales", 0.0))


def test_a_checkpoint_with_biases_of_zeros_and_needless_g_idx_opens_without_a_word_about_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvpage"):
        opened(tmp_path, "gptq-4bit-g32-sym", intact)
    assert [record for record in caplog.records if "not used" in record.getMessage()] == []


@pytest.mark.parametrize(
    ("bits", "outputs", "inputs", "tensor", "found"),
    [
        (4, 64, 60, "qweight", "60 inputs"),
        (4, 60, 64, "qzeros", "60 outputs"),
        (3, 64, 48, "qweight", "48 inputs"),
        (3, 48, 64, "qzeros", "48 outputs"),
        (2, 64, 72, "qweight", "72 inputs"),
        (8, 6, 64, "qzeros", "6 outputs"),
    ],
)
def test_sizes_that_fill_no_words_are_refused(
    bits: int, outputs: int, inputs: int, tensor: str, found: str
) -> None:
    view = TensorsView({"m.qweight": torch.zeros(2, 2, dtype=torch.int32)})
    scheme = Gptq.from_checkpoint(config_of(bits=bits, group=32, symmetric=True), view)
    with pytest.raises(CheckpointError) as caught:
        scheme.tensors(linear("m", outputs, inputs), view)
    for part in ("the sample", f"'m.{tensor}'", f"for {bits} bits", found):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits should be 2, 3, 4 or 8, found 5"),
        ({"bits": "4"}, "bits should be 2, 3, 4 or 8, found '4'"),
        ({"bits": True}, "bits should be .* found True"),
        ({"bits": None}, "bits should be .* found None"),
        ({"bits": 10**400}, "bits should be .* found 1000"),
        ({"group_size": 0}, "group_size should be .* found 0"),
        ({"group_size": -2}, "group_size should be .* found -2"),
        ({"group_size": None}, "group_size should be .* found None"),
        ({"group_size": 32.0}, "group_size should be .* found 32.0"),
        ({"sym": "yes"}, "sym should be true or false, found 'yes'"),
        ({"desc_act": 1}, "desc_act should be true or false, found 1"),
        ({"lm_head": "no"}, "lm_head should be true or false"),
        ({"is_marlin_format": True}, "is_marlin_format should be false .* found True"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format should be gptq or gptq_v2 .* found 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "found 'gptq_p'"),
        ({"checkpoint_format": "bitblas"}, "found 'bitblas'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format should be .* found \\['gptq'\\]"),
        ({"format": "gptq_v2"}, "format should be as checkpoint_format, 'gptq', found 'gptq_v2'"),
        ({"quant_method": "awq"}, "quant_method should be gptq or gptq_marlin, found 'awq'"),
        ({"method": "qqq"}, "method should be .* found 'qqq'"),
        ({"pack_dtype": "int64"}, "pack_dtype should be 'int32', found 'int64'"),
        ({"dynamic": ["q_proj"]}, "dynamic should be an object of patterns"),
        ({"dynamic": {"(": {}}}, r"dynamic should be regular expressions .* found '\('"),
        ({"dynamic": {"q_proj": 4}}, r"dynamic\['q_proj'\] should be an object, found 4"),
        ({"dynamic": {"q_proj": {"bits": 6}}}, "bits should be .* found 6"),
        ({"dynamic": {"q_proj": {"checkpoint_format": "marlin"}}}, "found 'marlin'"),
    ],
)
def test_a_config_that_is_not_read_here_is_named_with_what_is(changes: dict[str, Any], message: str) -> None:
    config = {**config_of(bits=4, group=32, symmetric=True), **changes}
    with pytest.raises(CheckpointError, match=message):
        Gptq.from_checkpoint(config, TensorsView({}))


def test_act_order_without_g_idx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj.g_idx' of shape \[128\], int32, is missing"):
        opened(
            tmp_path,
            "gptq-4bit-g32-asym-actorder",
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")],
        )


def test_a_matrix_without_any_of_its_tensors_is_a_plain_one() -> None:
    matrix = random_matrix(0, 32, 64, bits=4, group=32, symmetric=True)
    view = TensorsView({f"m.{suffix}": tensor for suffix, tensor in matrix.stored(1).items()})
    scheme = Gptq.from_checkpoint(config_of(bits=4, group=32, symmetric=True), view)
    assert scheme.tensors(linear("other", 32, 64), view) == {}
    assert scheme.sketch(linear("other", 32, 64), view) is None
