"""GGUF's blocks become the exact numbers of ggml, whatever the type; files of llama.cpp's own tools too."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_writer import F32, encoded, gguf_bytes

from kvpage import CheckpointError
from kvpage.api.quant import Codebook, GroupedInt
from kvpage.loading.quantized import sketch
from kvpage.testing.checkpoints import QuantSample, TensorsView, linear
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_gguf.reader import GGUFReader
from kvpage_gguf.types import KINDS, GGUFScheme

DATA = Path(__file__).parent.parent / "data" / "quant"
FILES = ("gguf-q4_0", "gguf-q4_k-mix", "gguf-q8_0")
CONFIG = {"quant_method": "gguf"}
DOWN, ROUTER = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate"

NUMBERS = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
"""Where a block has its float16 numbers."""


@functools.cache
def blocks() -> dict[str, torch.Tensor]:
    with np.load(DATA / "gguf-blocks" / "blocks.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def of_blocks(case: str, module: str) -> QuantSample:
    """``case`` of blocks.npz ("random.q4_k") as the matrix ``module``."""
    stored, values = blocks()[case], blocks()[f"{case}.values"]
    return QuantSample(
        config=CONFIG,
        tensors={
            f"{module}.{case.partition('.')[2]}": stored,
            f"{ROUTER}.weight": torch.zeros(8, values.shape[1]),
        },
        linears=(linear(module, *values.shape),),
        oracle={module: values},
        plain=(linear(ROUTER, 8, values.shape[1]),),
        wrong_configs=({"quant_method": "gptq"},),
    )


def of_file(name: str) -> QuantSample:
    view = GGUFReader(DATA / name / "model.gguf").weights()
    oracle = np.load(DATA / name / "oracle.npz")
    known = {
        key.removeprefix("w:").removesuffix(".weight"): key for key in oracle.files if key.startswith("w:")
    }
    config = json.loads((DATA / name / "config.json").read_text())
    inputs = {"down_proj": config["intermediate_size"]}
    packed = [key.rpartition(".")[0] for key in view.names() if view.info(key).dtype == "uint8"]
    infos = {key.rpartition(".")[0]: view.info(key) for key in view.names()}
    return QuantSample(
        config=CONFIG,
        tensors={key: view.read(key) for key in view.names()},
        linears=tuple(
            linear(
                module, infos[module].shape[0], inputs.get(module.rpartition(".")[2], config["hidden_size"])
            )
            for module in packed
        ),
        oracle={module: torch.from_numpy(oracle[key]) for module, key in known.items() if module in packed},
    )


class TestGGUFScheme(QuantSchemeConformance):
    scheme = GGUFScheme
    ranks = (2,)

    def samples(self) -> Iterator[tuple[str, QuantSample]]:
        for case in blocks():
            if not case.endswith(".values"):
                yield case, of_blocks(case, DOWN)
        for name in FILES:
            yield name, of_file(name)


def test_every_type_has_blocks_to_be_proven_on() -> None:
    assert {case for case in blocks() if case.startswith("random") and case.count(".") == 1} == {
        f"random.{name}" for name in KINDS
    }


@pytest.mark.parametrize("name", FILES)
def test_every_matrix_of_a_file_has_the_oracles_bytes(name: str) -> None:
    view = GGUFReader(DATA / name / "model.gguf").weights()
    expected = json.loads((DATA / name / "oracle.json").read_text())
    scheme = GGUFScheme.from_checkpoint(CONFIG, view)
    found = {}
    for key in view.names():
        module, _, suffix = key.rpartition(".")
        values = view.read(key)
        if suffix in KINDS:
            inputs = 256 if module.endswith("down_proj") else 128
            values = scheme.to_form(linear(module, values.shape[0], inputs), {suffix: values}).dequantize()
        found[f"{module}.weight"] = hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()
    assert found == expected


@pytest.mark.parametrize("name", FILES)
def test_slices_are_the_rows_of_the_whole(name: str) -> None:
    view = GGUFReader(DATA / name / "model.gguf").weights()
    for key in view.names():
        whole = view.read(key)
        rows = whole.shape[0]
        for start, stop in ((0, rows), (rows // 3, rows // 2 + 1), (5, 6), (rows - 1, rows)):
            assert torch.cat(list(view.slices(key, start, stop))).equal(whole[start:stop]), (key, start, stop)
        view.release(key)
        assert view.read(key).equal(whole)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_held_is_what_a_plan_counts(name: str) -> None:
    sample = of_blocks(f"random.{name}", DOWN)
    form = GGUFScheme().to_form(sample.linears[0], {name: sample.tensors[f"{DOWN}.{name}"]})
    planned = sketch(GGUFScheme(), sample.linears[0], sample.view())
    assert planned is not None
    assert [(t.shape, t.dtype) for t in planned.tensors()] == [(t.shape, t.dtype) for t in form.tensors()]
    assert isinstance(form, Codebook if name.startswith("iq4") else GroupedInt)


@pytest.mark.parametrize(("name", "place"), [(name, place) for name in NUMBERS for place in NUMBERS[name]])
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_numbers_that_are_not_finite_are_refused(name: str, place: int, number: float) -> None:
    sample = of_blocks(f"random.{name}", DOWN)
    damaged = sample.tensors[f"{DOWN}.{name}"].clone()
    damaged[1, place : place + 2] = torch.from_numpy(np.array([number], np.float16).view(np.uint8))
    with pytest.raises(CheckpointError, match=rf"{DOWN}.*not finite.*output 1"):
        GGUFScheme().to_form(sample.linears[0], {name: damaged})


def test_blocks_that_do_not_divide_the_inputs_are_refused() -> None:
    view = TensorsView({f"{DOWN}.q4_k": torch.zeros(3, 144, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"300 inputs.*blocks of 256"):
        GGUFScheme().tensors(linear(DOWN, 3, 300), view)


def test_a_matrix_stored_in_two_types_is_refused() -> None:
    stored = {f"{DOWN}.{name}": torch.zeros(3, 144, dtype=torch.uint8) for name in ("q4_k", "q8_0")}
    with pytest.raises(CheckpointError, match=r"as q8_0 and as q4_k|as q4_k and as q8_0"):
        GGUFScheme().tensors(linear(DOWN, 3, 256), TensorsView(stored))


def test_numbers_are_read_from_any_byte_on(tmp_path: Path) -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for extra in range(4):
        keys = {"general.architecture": "llama", "general.alignment": 1, "general.name": "x" * extra}
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(keys, {"output.weight": encoded(weight, F32)[0]}, alignment=1))
        assert GGUFReader(path).weights().read("lm_head.weight").equal(weight)
