"""Every variant of GPTQ is read exactly: widths, zero points, orders, groups, both versions."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_writer import ORDERS, Matrix, config_of, random_matrix, stream
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvpage.api.quant import ChannelInt8, GroupedInt, WeightForm
from kvpage.testing.checkpoints import TensorsView, linear
from kvpage_gptq.scheme import Gptq

UNDERFLOW = Path(__file__).parent.parent / "data/quant/gptq-v1-zero-underflow-layer/model.safetensors"
NAME = "model.layers.0.self_attn.q_proj"
VARIANTS = list(
    itertools.product((2, 3, 4, 8), (True, False), ORDERS, ((256, 32), (256, 64), (256, 128), (256, -1), (160, 64)), (1, 2))
)  # fmt: skip
IDS = [f"{b}bit-{'sym' if s else 'asym'}-{o}-{k}g{g}-v{v}" for b, s, o, (k, g), v in VARIANTS]


def read(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], outputs: int, inputs: int
) -> tuple[WeightForm, WeightForm | None]:
    """The form of one matrix, and its sketch."""
    view = TensorsView({f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items()})
    spec = linear(NAME, outputs, inputs)
    scheme = Gptq.from_checkpoint(config, view)
    taken = {suffix: view.read(f"{NAME}.{suffix}") for suffix in scheme.tensors(spec, view)}
    return scheme.to_form(spec, taken), scheme.sketch(spec, view)


def described(form: WeightForm | None) -> object:
    assert isinstance(form, GroupedInt | ChannelInt8)
    return (type(form), form.kind, [(tensor.shape, tensor.dtype) for tensor in form.tensors()])


@pytest.mark.parametrize(("bits", "symmetric", "order", "size", "version"), VARIANTS, ids=IDS)
def test_a_packed_matrix_is_read_exactly_and_sketched_as_it_is(
    bits: int, symmetric: bool, order: str, size: tuple[int, int], version: int
) -> None:
    inputs, group = size
    matrix = random_matrix(bits, 32, inputs, bits=bits, group=group, symmetric=symmetric, order=order)
    config = config_of(bits=bits, group=group, symmetric=symmetric, order=order, version=version)
    form, sketch = read(config, matrix.stored(version), 32, inputs)
    assert torch.equal(form.dequantize(), matrix.dequantized())
    assert described(sketch) == described(form)
    assert sketch is not None
    assert all(tensor.is_meta for tensor in sketch.tensors())


@given(data=st.data())
def test_whatever_is_packed_comes_back(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from((2, 3, 4, 8)), "bits")
    version = data.draw(st.sampled_from((1, 2)), "version")
    symmetric = data.draw(st.booleans(), "symmetric")
    order = data.draw(st.sampled_from(ORDERS), "order")
    multiple = 32 // math.gcd(32, bits)
    inputs = multiple * data.draw(st.integers(1, 12), "inputs")
    outputs = multiple * data.draw(st.integers(1, 4), "outputs")
    group = data.draw(st.one_of(st.just(-1), st.integers(1, 2 * inputs)), "group")
    dtype = data.draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)), "dtype")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    matrix = random_matrix(
        seed, outputs, inputs, bits=bits, group=group, symmetric=symmetric, order=order, dtype=dtype
    )
    config = config_of(bits=bits, group=group, symmetric=symmetric, order=order, version=version)
    form, sketch = read(config, matrix.stored(version), outputs, inputs)
    assert torch.equal(form.dequantize(), matrix.dequantized())
    assert described(sketch) == described(form)


def test_groups_of_any_inputs_are_read_as_g_idx_says() -> None:
    """The definition allows groups of different sizes, and one that nothing is in."""
    matrix = random_matrix(0, 32, 64, bits=4, group=16, symmetric=False)
    uneven = Matrix(
        codes=matrix.codes, zeros=matrix.zeros, scales=matrix.scales, bits=4,
        g_idx=np.repeat([2, 0, 3, 0], [24, 8, 20, 12]),
    )  # fmt: skip
    config = config_of(bits=4, group=16, symmetric=False, order="act-order")
    form, _ = read(config, uneven.stored(1), 32, 64)
    assert torch.equal(form.dequantize(), uneven.dequantized())


@pytest.mark.parametrize(
    "changes",
    [{}, {"desc_act": True, "static_groups": True}, {"desc_act": True, "meta": {"static_groups": True}}],
)
def test_g_idx_may_be_absent_where_groups_lie_side_by_side(changes: dict[str, Any]) -> None:
    matrix = random_matrix(0, 32, 128, bits=4, group=32, symmetric=True)
    stored = matrix.stored(1)
    del stored["g_idx"]
    form, _ = read({**config_of(bits=4, group=32, symmetric=True), **changes}, stored, 32, 128)
    assert torch.equal(form.dequantize(), matrix.dequantized())


def test_static_groups_need_no_permutation() -> None:
    matrix = random_matrix(0, 32, 128, bits=4, group=32, symmetric=True, order="static")
    form, _ = read(
        {**config_of(bits=4, group=32, symmetric=True, order="static"), "static_groups": False},
        matrix.stored(1), 32, 128,
    )  # fmt: skip
    assert isinstance(form, GroupedInt)
    assert form.permutation is None


def test_columns_of_act_order_are_the_inputs_in_the_stable_order_of_their_groups() -> None:
    matrix = random_matrix(0, 32, 128, bits=4, group=32, symmetric=True, order="act-order")
    config = config_of(bits=4, group=32, symmetric=True, order="act-order")
    form, _ = read(config, matrix.stored(1), 32, 128)
    assert isinstance(form, GroupedInt)
    assert form.permutation is not None
    assert form.permutation.tolist() == sorted(range(128), key=lambda k: int(matrix.g_idx[k]))
    assert form.group == 32


def test_a_config_that_does_not_say_sym_is_read_by_its_zero_points() -> None:
    for symmetric in (True, False):
        matrix = random_matrix(0, 32, 128, bits=4, group=32, symmetric=symmetric)
        config = config_of(bits=4, group=32, symmetric=symmetric)
        del config["sym"]
        form, _ = read(config, matrix.stored(1), 32, 128)
        assert torch.equal(form.dequantize(), matrix.dequantized())


def test_symmetric_weights_carry_no_zero_points_and_few_bits_are_centred() -> None:
    for bits in (2, 3, 4):
        matrix = random_matrix(0, 32, 128, bits=bits, group=32, symmetric=True)
        form, _ = read(config_of(bits=bits, group=32, symmetric=True), matrix.stored(1), 32, 128)
        assert isinstance(form, GroupedInt)
        assert (form.bits, form.zero, form.zeros, form.activation) == (4, 8, None, "per-group")


def test_8_bits_with_one_scale_an_output_are_the_form_of_int8() -> None:
    matrix = random_matrix(0, 32, 128, bits=8, group=-1, symmetric=True, dtype=torch.bfloat16)
    form, _ = read(config_of(bits=8, group=-1, symmetric=True), matrix.stored(1), 32, 128)
    assert isinstance(form, ChannelInt8)
    assert (form.scales.dtype, form.activation) == (torch.float32, "none")


DYNAMIC = {
    r"self_attn": {"bits": 3},  # no name begins so
    r"+:.*\.q_proj$": {"bits": 8, "group_size": 64},
    r"model\.layers\.0\.self_attn\.k": {"bits": 2},
    r"-:.*\.o_proj": {},
    r".*": {"sym": False},
}


@pytest.mark.parametrize(
    ("module", "bits", "group", "symmetric"),
    [("q_proj", 8, 64, True), ("k_proj", 2, 32, True), ("v_proj", 4, 32, False), ("o_proj", 4, 32, True)],
)
def test_the_first_pattern_that_matches_a_module_overrides_the_config(
    module: str, bits: int, group: int, symmetric: bool
) -> None:
    """o_proj was skipped, says the config, but the file holds it quantized: that is what counts."""
    name = f"model.layers.0.self_attn.{module}"
    matrix = random_matrix(0, 32, 128, bits=bits, group=group, symmetric=symmetric)
    view = TensorsView({f"{name}.{suffix}": tensor for suffix, tensor in matrix.stored(1).items()})
    config = {**config_of(bits=4, group=32, symmetric=True), "dynamic": DYNAMIC}
    scheme, spec = Gptq.from_checkpoint(config, view), linear(name, 32, 128)
    taken = {suffix: view.read(f"{name}.{suffix}") for suffix in scheme.tensors(spec, view)}
    assert torch.equal(scheme.to_form(spec, taken).dequantize(), matrix.dequantized())


def test_the_head_is_read_wherever_the_file_holds_it_quantized() -> None:
    matrix = random_matrix(0, 64, 128, bits=4, group=32, symmetric=True)
    view = TensorsView({f"lm_head.{suffix}": tensor for suffix, tensor in matrix.stored(1).items()})
    scheme = Gptq.from_checkpoint({**config_of(bits=4, group=32, symmetric=True), "lm_head": True}, view)
    assert scheme.tensors(linear("lm_head", 64, 128, "head.weight"), view)
    plain = TensorsView({"lm_head.weight": torch.zeros(64, 128)})
    assert scheme.tensors(linear("lm_head", 64, 128, "head.weight"), plain) == {}


class TestZeroUnderflow:
    """A zero point of 0 in version 1, stored less one: ``gptq-v1-zero-underflow-layer``."""

    def form(self, qzeros: str, version: int) -> torch.Tensor:
        tensors = load_file(UNDERFLOW)
        stored = {suffix: tensors[suffix] for suffix in ("qweight", "scales", "g_idx")}
        config = config_of(bits=4, group=32, symmetric=False, version=version)
        return read(config, {**stored, "qzeros": tensors[qzeros]}, 64, 64)[0].dequantize()

    def truth(self) -> torch.Tensor:
        tensors = load_file(UNDERFLOW)
        groups = tensors["g_idx"].long()
        words = tensors["qweight"].numpy().view(np.uint32)
        codes = np.stack([(words >> np.uint32(4 * i)) & 15 for i in range(8)], 1).reshape(64, 64)
        assert np.array_equal(stream(codes.astype(np.int64), 4), words)
        steps = torch.from_numpy(codes.astype(np.int64)) - tensors["true_zeros"][groups]
        return (tensors["scales"].float()[groups] * steps.float()).t().contiguous()

    def test_what_gptqmodel_writes_is_read_exactly(self) -> None:
        assert torch.equal(self.form("qzeros_wordwise", 1), self.truth())

    def test_version_2_is_read_exactly_and_without_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "kvpage"):
            assert torch.equal(self.form("qzeros_v2", 2), self.truth())
        assert caplog.records == []

    def test_what_auto_gptq_damaged_is_named_and_the_other_outputs_are_right(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "kvpage"):
            values, truth = self.form("qzeros_autogptq", 1), self.truth()
        (record,) = caplog.records
        assert record.name == "kvpage"
        assert f"{NAME}.qzeros" in record.getMessage()
        right = [bool(torch.equal(values[n], truth[n])) for n in range(64)]
        # The smear of output 3 reaches the last of its word, that of output 15 nothing.
        assert [n for n in range(64) if not right[n]] == [4, 5, 6, 7]

    def test_symmetric_checkpoints_do_not_warn(self, caplog: pytest.LogCaptureFixture) -> None:
        matrix = random_matrix(0, 32, 128, bits=4, group=32, symmetric=True)
        with caplog.at_level(logging.WARNING, "kvpage"):
            read(config_of(bits=4, group=32, symmetric=True), matrix.stored(1), 32, 128)
        assert caplog.records == []
