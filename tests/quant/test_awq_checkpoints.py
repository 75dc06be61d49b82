"""The AWQ scheme passes the suite on AutoAWQ's checkpoints, and reads every layout that a writer of its own packs."""

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
from awq_writer import LAYOUTS, config_of, random_matrix
from hypothesis import given
from hypothesis import strategies as st

from kvpage.api.quant import GroupedInt, WeightForm
from kvpage.testing.checkpoints import QuantSample, TensorsView, linear, read_folder
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_awq.plugin import kvpage_quantization_schemes
from kvpage_awq.scheme import Awq

DATA = Path(__file__).parent.parent / "data" / "quant"
VECTORS = sorted(path.parent.name for path in DATA.glob("awq-*/oracle.json"))
EXACT = [name for name in VECTORS if "gemvfast" not in name]
NAME = "model.layers.0.self_attn.q_proj"
OUTPUTS = {"q_proj": 128, "o_proj": 128, "k_proj": 64, "v_proj": 64, "down_proj": 128}


@functools.cache
def vector(name: str) -> QuantSample:
    """A checkpoint of AutoAWQ; its oracle for layer 0's k_proj and down_proj where that is exact."""
    config, tensors = read_folder(DATA / name)
    modules = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    return QuantSample(
        config=config,
        tensors=tensors,
        linears=tuple(
            linear(module, OUTPUTS.get(last, 256), 256 if last == "down_proj" else 128)
            for module in modules
            for last in [module.rpartition(".")[2]]
        ),
        oracle=oracle(name) if name in EXACT else {},
        plain=(linear("lm_head", 512, 128, "head.weight"),),
        wrong_configs=({**config, "bits": 8}, {**config, "group_size": 64}, {**config, "zero_point": False}),
    )


def oracle(name: str) -> dict[str, torch.Tensor]:
    stored = np.load(DATA / name / "oracle.npz")
    return {
        key[2:].removesuffix(".weight"): torch.from_numpy(stored[key]) for key in stored if key[:2] == "w:"
    }


@functools.cache
def own(layout: str, group: int, inputs: int = 1024) -> QuantSample:
    specs = (linear(NAME, 64, 256), linear("model.layers.0.mlp.down_proj", 32, inputs))
    matrices = {
        s.name: random_matrix(i, s.out_features, s.in_features, group=group) for i, s in enumerate(specs)
    }
    tensors = {
        f"{module}.{suffix}": tensor
        for module, matrix in matrices.items()
        for suffix, tensor in matrix.stored(layout).items()
    }
    return QuantSample(
        config=config_of(layout=layout, group=group),
        tensors=tensors,
        linears=specs,
        oracle={module: matrix.dequantized(layout) for module, matrix in matrices.items()},
    )


class TestAwq(QuantSchemeConformance):
    scheme = Awq

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from ((name, vector(name)) for name in VECTORS)
        for layout in LAYOUTS:
            yield f"{layout} group 32", own(layout, 32)
            yield f"{layout} one group", own(layout, -1)
        yield "gemm group of all inputs", own("gemm", 256, inputs=256)


@pytest.mark.parametrize("name", EXACT)
def test_every_matrix_of_a_real_checkpoint_has_the_values_its_tool_gives_it(name: str) -> None:
    sample, hashes = vector(name), json.loads((DATA / name / "oracle.json").read_text())
    values = {f"{spec.name}.weight": TestAwq().load(sample, spec).dequantize() for spec in sample.linears}
    assert {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in values.items()
    } == hashes


def test_gemv_fast_is_as_close_as_its_rounded_zero_points_allow() -> None:
    name = "awq-gemvfast-g128-layer"
    sample, expected = vector(name), oracle(name)
    assert {spec.name for spec in sample.linears} == expected.keys()
    for spec in sample.linears:
        values, truth = TestAwq().load(sample, spec).dequantize(), expected[spec.name]
        assert (values - truth).abs().max() <= 1e-3 * truth.abs().max()


def read(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], outputs: int, inputs: int
) -> tuple[WeightForm, WeightForm | None]:
    """The form of one matrix, and its sketch."""
    view = TensorsView({f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()})
    spec = linear(NAME, outputs, inputs)
    scheme = Awq.from_checkpoint(config, view)
    taken = {suffix: view.read(f"{NAME}.{suffix}") for suffix in scheme.tensors(spec, view)}
    return scheme.to_form(spec, taken), scheme.sketch(spec, view)


def described(form: WeightForm | None) -> object:
    assert isinstance(form, GroupedInt)
    return (form.kind, [(tensor.shape, tensor.dtype) for tensor in form.tensors()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_matrix_is_read_exactly_and_sketched_as_it_is(
    layout: str, group: int, dtype: torch.dtype
) -> None:
    matrix = random_matrix(group + 1, 24, 768, group=group, dtype=dtype)
    form, sketch = read(config_of(layout=layout, group=group), matrix.stored(layout), 24, 768)
    assert torch.equal(form.dequantize(), matrix.dequantized(layout))
    assert described(sketch) == described(form)
    assert sketch is not None
    assert all(tensor.is_meta for tensor in sketch.tensors())


@given(data=st.data())
def test_whatever_is_packed_comes_back(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    group = data.draw(st.sampled_from((32, 64, 128, 192, 256)), "group")
    block = 64 if layout == "gemv_fast" else 8
    inputs = group * data.draw(st.integers(1, 5).filter(lambda n: group * n % block == 0), "groups")
    outputs = 8 * data.draw(st.integers(1, 6), "outputs")
    matrix = random_matrix(data.draw(st.integers(0, 2**32 - 1), "seed"), outputs, inputs, group=group)
    form, sketch = read(config_of(layout=layout, group=group), matrix.stored(layout), outputs, inputs)
    assert torch.equal(form.dequantize(), matrix.dequantized(layout))
    assert described(sketch) == described(form)


def test_the_layouts_of_one_matrix_are_one_form_but_for_the_rounding_of_gemv_fast() -> None:
    matrix = random_matrix(0, 64, 256, group=64)
    gemm, gemv, fast = (
        read(config_of(layout=layout, group=64), matrix.stored(layout), 64, 256)[0] for layout in LAYOUTS
    )
    assert all(torch.equal(one, other) for one, other in zip(gemm.tensors(), gemv.tensors(), strict=True))
    assert isinstance(gemm, GroupedInt)
    assert isinstance(fast, GroupedInt)
    assert torch.equal(fast.codes, gemm.codes)
    assert (fast.zero, fast.zeros, gemm.activation, fast.activation) == (0, None, "per-group", "per-group")


@pytest.mark.parametrize(
    ("version", "layout"),
    [("GEMM", "gemm"), ("marlin", "gemm"), ("exllama", "gemm"), (None, "gemm"), ("GEMV", "gemv"),
     ("gemv_fast", "gemv_fast"), ("GEMV_Fast", "gemv_fast"), ("llm-awq", "gemv_fast")],
)  # fmt: skip
def test_versions_are_written_in_many_ways(version: str | None, layout: str) -> None:
    matrix = random_matrix(0, 64, 128, group=128)
    config = {**config_of(layout=layout, group=128), "version": version}
    form, _ = read(config, matrix.stored(layout), 64, 128)
    assert torch.equal(form.dequantize(), matrix.dequantized(layout))


def test_the_keys_of_its_own_config_file_are_understood() -> None:
    matrix = random_matrix(0, 64, 128, group=32)
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    form, _ = read(config, matrix.stored("gemm"), 64, 128)
    assert torch.equal(form.dequantize(), matrix.dequantized("gemm"))


def test_llm_awq_calls_its_zero_points_scaled_zeros() -> None:
    matrix = random_matrix(0, 64, 128, group=128)
    stored = matrix.stored("gemv_fast")
    stored["scaled_zeros"] = stored.pop("qzeros")
    form, sketch = read(config_of(layout="llm-awq", group=128), stored, 64, 128)
    assert torch.equal(form.dequantize(), matrix.dequantized("gemv_fast"))
    assert described(sketch) == described(form)


def test_the_file_says_which_modules_are_quantized() -> None:
    """ "gate" means a router and is a part of gate_proj: tools disagree on what such an entry matches."""
    matrix = random_matrix(0, 64, 128, group=32)
    gate_proj = "model.layers.0.mlp.gate_proj"
    view = TensorsView({f"{gate_proj}.{suffix}": tensor for suffix, tensor in matrix.stored("gemm").items()})
    config = {**config_of(layout="gemm", group=32), "modules_to_not_convert": ["gate", "lm_head"]}
    scheme = Awq.from_checkpoint(config, view)
    assert scheme.tensors(linear(gate_proj, 64, 128), view).keys() == {"qweight", "qzeros", "scales"}
    for name in ("model.layers.0.mlp.gate", "lm_head", "model.layers.0.self_attn.q_proj"):
        assert scheme.tensors(linear(name, 64, 128), view) == {}
        assert scheme.sketch(linear(name, 64, 128), view) is None


def test_the_scheme_is_registered_for_what_configs_call_it() -> None:
    (record,) = kvpage_quantization_schemes()
    assert (record.name, record.factory, record.bits) == ("awq", "kvpage_awq.scheme:Awq", 4)
    assert set(record.methods) == {"awq", "awq_marlin"}
