"""Damaged and unsupported AWQ checkpoints are refused before anything runs: file, tensor, expected, found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awq_writer import LAYOUTS, config_of, random_matrix

from kvpage import CheckpointError, Engine
from kvpage.testing.checkpoints import TensorsView, linear, read_folder, write_folder
from kvpage_awq.scheme import Awq

DATA = Path(__file__).parent.parent / "data" / "quant"
K_PROJ = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], object]


def opened(tmp_path: Path, damage: Damage, **changes: Any) -> None:
    """Start an engine on AutoAWQ's checkpoint, changed: its tensors by ``damage``, its config by ``changes``."""
    config = json.loads((DATA / "awq-gemm-g32" / "config.json").read_text())
    config["quantization_config"].update(changes)
    tensors = dict(read_folder(DATA / "awq-gemm-g32")[1])
    damage(tensors)
    write_folder(tmp_path, config, tensors)
    Engine(tmp_path, dtype="float32", skip_tokenizer_init=True, num_kv_blocks=16).close()


def with_value(name: str, value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[5] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "name", "expected", "found"),
    [
        (lambda t: t.pop(f"{K_PROJ}.qzeros"), "qzeros", "[4, 8], int32", "is missing"),
        (lambda t: t.pop(f"{K_PROJ}.qweight"), "qweight", "[128, 8], int32", "is missing"),
        (lambda t: t.pop(f"{K_PROJ}.scales"), "scales", "[4, 64], float16", "is missing"),
        (lambda t: t.update({f"{K_PROJ}.qweight": t[f"{K_PROJ}.qweight"][:120].clone()}), "qweight", "[128, 8]", "[120, 8]"),
        (lambda t: t.update({f"{K_PROJ}.qweight": t[f"{K_PROJ}.qweight"].long()}), "qweight", "int32", "int64"),
        (lambda t: t.update({f"{K_PROJ}.qzeros": t[f"{K_PROJ}.qzeros"].short()}), "qzeros", "int32", "int16"),
        (lambda t: t.update({f"{K_PROJ}.scales": t[f"{K_PROJ}.scales"].double()}), "scales", "float16", "float64"),
        (with_value(f"{K_PROJ}.scales", torch.nan), "scales", "finite numbers of at least 0", "found nan"),
        (with_value(f"{K_PROJ}.scales", torch.inf), "scales", "finite numbers of at least 0", "found inf"),
        (with_value(f"{K_PROJ}.scales", -0.5), "scales", "finite numbers of at least 0", "found -0.5"),
    ],
)  # fmt: skip
def test_a_damaged_tensor_is_named(
    tmp_path: Path, damage: Damage, name: str, expected: str, found: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, damage)
    message = str(caught.value)
    for part in (str(tmp_path / "model.safetensors"), f"'{K_PROJ}.{name}'", expected, found):
        assert part in message


def test_a_matrix_that_is_there_plain_too_is_refused(tmp_path: Path) -> None:
    plain = torch.zeros(64, 128, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: '{K_PROJ}' is stored both quantized"):
        opened(tmp_path, lambda tensors: tensors.update({f"{K_PROJ}.weight": plain}))


def test_scales_of_float32_are_legal(tmp_path: Path) -> None:
    name = f"{K_PROJ}.scales"
    opened(tmp_path, lambda tensors: tensors.update({name: tensors[name].float()}))


def test_a_group_size_of_another_checkpoint_is_told_by_the_shapes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, lambda tensors: None, group_size=64)
    for part in (str(tmp_path / "model.safetensors"), "self_attn.q_proj", "[2, 16], int32", "[4, 16]"):
        assert part in str(caught.value)


def asked(config: dict[str, Any], tensors: Tensors, outputs: int, inputs: int) -> None:
    view = TensorsView({f"{K_PROJ}.{suffix}": tensor for suffix, tensor in tensors.items()})
    Awq.from_checkpoint(config, view).tensors(linear(K_PROJ, outputs, inputs), view)


@pytest.mark.parametrize("outputs", [64, 128], ids=["tall", "square"])
@pytest.mark.parametrize(("stated", "stored"), list(itertools.permutations(LAYOUTS, 2)))
def test_a_version_that_is_not_that_of_the_file_is_named_with_the_right_one(
    stated: str, stored: str, outputs: int
) -> None:
    tensors = random_matrix(0, outputs, 128, group=32).stored(stored)
    with pytest.raises(CheckpointError) as caught:
        asked(config_of(layout=stated, group=32), tensors, outputs, 128)
    shapes = (list(tensors["qweight"].shape), list(tensors["scales"].shape))
    for part in (
        "the sample",
        f"'{K_PROJ}.qweight'",
        f"found {shapes[0]} and {shapes[1]}",
        f'version to "{stored}"',
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "group", "outputs", "inputs", "tensor", "expected", "found"),
    [
        ("gemm", 32, 64, 144, "scales", "groups of 32", "144 inputs"),
        ("gemm", 256, 64, 128, "scales", "groups of 256", "128 inputs"),
        ("gemm", 32, 60, 128, "qweight", "outputs that 8 divides", "60 outputs"),
        ("gemm", 1, 64, 127, "qweight", "inputs that 2 divides", "127 inputs"),
        ("gemv", 132, 64, 132, "qweight", "inputs that 8 divides", "132 inputs"),
        ("gemv_fast", 32, 64, 96, "qweight", "inputs that 64 divides", "96 inputs"),
        ("gemv", 16, 64, 128, "qzeros", "groups of 32, 64, or 128 and more", "groups of 16"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    layout: str, group: int, outputs: int, inputs: int, tensor: str, expected: str, found: str
) -> None:
    stored = {"qweight": torch.zeros(2, 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError) as caught:
        asked(config_of(layout=layout, group=group), stored, outputs, inputs)
    for part in ("the sample", f"'{K_PROJ}.{tensor}'", expected, found):
        assert part in str(caught.value)


def test_offsets_that_are_not_finite_are_named() -> None:
    stored = random_matrix(0, 8, 128, group=128).stored("gemv_fast")
    stored["qzeros"][0, 3] = torch.inf
    view = TensorsView({f"{K_PROJ}.{suffix}": tensor for suffix, tensor in stored.items()})
    scheme = Awq.from_checkpoint(config_of(layout="gemv_fast", group=128), view)
    with pytest.raises(CheckpointError, match=rf"'{K_PROJ}.qzeros' should have finite numbers, found inf"):
        scheme.to_form(linear(K_PROJ, 8, 128), stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"bits \(w_bit\) should be 4, found 8"),
        ({"bits": None}, r"bits \(w_bit\) should be 4, found None"),
        ({"bits": 4.0}, r"should be 4, found 4.0"),
        ({"w_bit": 3}, "w_bit should be as bits, 4, found 3"),
        ({"group_size": 0}, r"group_size \(q_group_size\) should be .* found 0"),
        ({"group_size": "32"}, "found '32'"),
        ({"q_group_size": 64}, "q_group_size should be as group_size, 32, found 64"),
        ({"zero_point": False}, "zero_point should be true .* found False"),
        ({"version": "gemm3"}, "version should be one of gemm, gemv, .* found 'gemm3'"),
        ({"version": 1}, "version should be one of .* found 1"),
        ({"quant_method": "gptq"}, "quant_method should be awq or awq_marlin, found 'gptq'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert should be a list of names"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert should be .* found \[1\]"),
    ],
)
def test_a_config_that_is_not_read_here_is_named_with_what_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Awq.from_checkpoint({**config_of(layout="gemm", group=32), **changes}, TensorsView({}))


@pytest.mark.parametrize("divisor", [1.0, 2.0])
def test_scales_of_an_activation_are_refused_unless_they_change_nothing(
    tmp_path: Path, divisor: float
) -> None:
    """As AutoAWQ writes them for GPT-NeoX and StarCoder2: it divides what comes out of mlp.act."""
    name = "model.layers.1.mlp.act.scales"

    def damage(tensors: Tensors) -> None:
        tensors[name] = torch.full((256,), divisor, dtype=torch.float16)

    if divisor == 1.0:
        opened(tmp_path, damage)
        return
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor '{name}' should be 1 everywhere"):
        opened(tmp_path, damage)
