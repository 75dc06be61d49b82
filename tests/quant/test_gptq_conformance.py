"""The GPTQ scheme passes the suite on checkpoints of the real tools and on one's own of every variant."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_writer import config_of, random_matrix

from kvpage.api.quant import LinearSpec
from kvpage.testing.checkpoints import QuantSample, linear, read_folder
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_gptq.plugin import kvpage_quantization_schemes
from kvpage_gptq.scheme import Gptq

DATA = Path(__file__).parent.parent / "data" / "quant"
VECTORS = sorted(path.parent.name for path in DATA.glob("gptq-*/oracle.json"))
INPUTS = {"down_proj": 256}


@functools.cache
def vector(name: str) -> QuantSample:
    """A checkpoint of auto-gptq or gptqmodel; its oracle for layer 0's k_proj and down_proj."""
    config, tensors = read_folder(DATA / name)
    oracle = np.load(DATA / name / "oracle.npz")
    return QuantSample(
        config=config,
        tensors=tensors,
        linears=tuple(_linear(key.removesuffix(".qweight"), tensors) for key in tensors if "qweight" in key),
        oracle={
            key[2:].removesuffix(".weight"): torch.from_numpy(oracle[key])
            for key in oracle
            if key.startswith("w:")
        },
        plain=(linear("lm_head", 512, 128, "head.weight"),),
        wrong_configs=(
            {**config, "bits": 3 if config["bits"] != 3 else 4},
            {**config, "bits": 5},
            {**config, "group_size": 64},
            {**config, "checkpoint_format": "marlin"},
        ),
    )


def _linear(module: str, tensors: Mapping[str, torch.Tensor]) -> LinearSpec:
    inputs = INPUTS.get(module.rpartition(".")[2], 128)
    return linear(module, tensors[f"{module}.qweight"].shape[1], inputs)


OWN: dict[str, dict[str, Any]] = {
    "2-bit asymmetric": {"bits": 2, "group": 32, "symmetric": False},
    "3-bit asymmetric act-order": {"bits": 3, "group": 64, "symmetric": False, "order": "act-order"},
    "3-bit symmetric v2": {"bits": 3, "group": 128, "symmetric": True, "version": 2},
    "4-bit static groups": {"bits": 4, "group": 32, "symmetric": False, "order": "static"},
    "4-bit one group": {"bits": 4, "group": -1, "symmetric": True},
    "4-bit short last group": {"bits": 4, "group": 96, "symmetric": False, "version": 2},
    "4-bit short second group": {"bits": 4, "group": 144, "symmetric": False},
    "8-bit one group": {"bits": 8, "group": -1, "symmetric": True, "order": "act-order"},
    "8-bit groups": {"bits": 8, "group": 32, "symmetric": True},
    "8-bit asymmetric act-order": {"bits": 8, "group": 64, "symmetric": False, "order": "act-order"},
}


@functools.cache
def own(name: str) -> QuantSample:
    variant = dict(OWN[name])
    version = variant.pop("version", 1)
    specs = (
        linear("model.layers.0.self_attn.q_proj", 64, 128),
        linear("model.layers.0.mlp.down_proj", 32, 256),
    )
    matrices = {
        spec.name: random_matrix(seed, spec.out_features, spec.in_features, **variant)
        for seed, spec in enumerate(specs)
    }
    tensors = {
        f"{module}.{suffix}": tensor
        for module, matrix in matrices.items()
        for suffix, tensor in matrix.stored(version).items()
    }
    return QuantSample(
        config=config_of(version=version, **variant),
        tensors=tensors,
        linears=specs,
        oracle={module: matrix.dequantized() for module, matrix in matrices.items()},
    )


class TestGptq(QuantSchemeConformance):
    scheme = Gptq

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from ((name, vector(name)) for name in VECTORS)
        yield from ((name, own(name)) for name in OWN)


@pytest.mark.parametrize("name", VECTORS)
def test_every_matrix_of_a_real_checkpoint_has_the_values_its_tool_gives_it(name: str) -> None:
    sample, hashes = vector(name), json.loads((DATA / name / "oracle.json").read_text())
    values = {f"{spec.name}.weight": TestGptq().load(sample, spec).dequantize() for spec in sample.linears}
    assert {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in values.items()
    } == hashes


def test_act_order_is_cut_by_outputs_and_never_torn_apart_by_inputs() -> None:
    sample = vector("gptq-4bit-g32-asym-actorder")
    scheme = Gptq.from_checkpoint(sample.config, sample.view())
    for spec in sample.linears:
        dimensions = {suffix: t.shard_dim for suffix, t in scheme.tensors(spec, sample.view()).items()}
        cut = None if spec.cut == "inputs" else 1
        assert dimensions == {"qweight": cut, "qzeros": cut, "scales": cut, "g_idx": None}


def test_the_scheme_is_registered_for_what_configs_call_it() -> None:
    (record,) = kvpage_quantization_schemes()
    assert (record.name, record.factory, record.bits) == ("gptq", "kvpage_gptq.scheme:Gptq", 4)
    assert set(record.methods) == {"gptq", "gptq_marlin"}
