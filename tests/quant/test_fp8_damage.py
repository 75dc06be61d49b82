"""fp8 and fbgemm_fp8: what is damaged or of another kind is refused, by file, tensor, expected and found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fp8_conformance import HEAD, KINDS, Q, checkpoint

from kvpage import CheckpointError
from kvpage.api.quant import WeightForm
from kvpage.testing.checkpoints import QuantSample, TensorsView, linear
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_fp8.scheme import Fp8Checkpoint

FILE = "model-00001.safetensors"


class NamedView(TensorsView):
    """Tensors of a file with a name."""

    def where(self, name: str) -> str:
        return FILE


class Loading(QuantSchemeConformance):
    scheme = Fp8Checkpoint


def read(sample: QuantSample, **changes: torch.Tensor | None) -> WeightForm:
    """q_proj of the sample, some of its own tensors replaced."""
    replaced = {f"{Q}.{suffix}": tensor for suffix, tensor in changes.items()}
    tensors = {name: t for name, t in {**sample.tensors, **replaced}.items() if t is not None}
    return Loading().load(sample, sample.linears[0], NamedView(tensors))


def refusal(sample: QuantSample, **changes: torch.Tensor | None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(sample, **changes)
    return str(caught.value)


def scale_of(sample: QuantSample) -> str:
    return next(s for s in ("weight_scale", "weight_scale_inv") if f"{Q}.{s}" in sample.tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_not_a_number_in_weights_is_refused(kind: str, byte: int) -> None:
    sample = checkpoint(kind)
    codes = sample.tensors[f"{Q}.weight"].view(torch.uint8).clone()
    codes[-1, -1] = byte
    message = refusal(sample, weight=codes.view(torch.float8_e4m3fn))
    for part in (FILE, f"'{Q}.weight'", "finite numbers", "NaN (byte 0x7F or 0xFF)", "download"):
        assert part in message


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "e8m0" not in kind])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_scales_are_finite_and_not_negative(kind: str, value: float) -> None:
    sample = checkpoint(kind)
    name = scale_of(sample)
    scale = sample.tensors[f"{Q}.{name}"].clone()
    scale.view(-1)[-1] = value
    message = refusal(sample, **{name: scale})
    for part in (FILE, f"'{Q}.{name}'", "finite scales of at least 0", f"found {value}"):
        assert part in message


def test_a_power_of_two_that_is_no_number_is_refused() -> None:
    sample = checkpoint("block-e8m0")
    scale = sample.tensors[f"{Q}.weight_scale_inv"].view(torch.uint8).clone()
    scale[0, 0] = 0xFF
    message = refusal(sample, weight_scale_inv=scale.view(torch.float8_e8m0fnu))
    assert f"'{Q}.weight_scale_inv' should hold finite scales of at least 0, found nan" in message


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8, torch.uint8])
@pytest.mark.parametrize("kind", ["tensor", "block", "channel"])
def test_weights_of_another_kind_are_refused(kind: str, dtype: torch.dtype) -> None:
    sample = checkpoint(kind)
    message = refusal(sample, weight=sample.tensors[f"{Q}.weight"].view(torch.uint8).view(dtype))
    for part in (f"'{Q}.weight'", "float8_e4m3fn", str(dtype).removeprefix("torch.")):
        assert part in message


@pytest.mark.parametrize(
    ("kind", "name"), [("tensor-static", "input_scale"), ("tensor-transformers", "activation_scale")]
)
def test_static_activations_have_a_scale(kind: str, name: str) -> None:
    sample = checkpoint(kind)
    assert f"'{Q}.{name}' is missing" in refusal(sample, **{name: None})
    message = refusal(sample, **{name: torch.tensor(-2.0)})
    assert f"'{Q}.{name}' should hold finite scales of at least 0, found -2.0" in message
    assert name in refusal(sample, **{name: torch.ones(3)})


@pytest.mark.parametrize("shape", [(2,), (64,), (1, 2), (0,)])
def test_a_tensor_has_one_scale(shape: tuple[int, ...]) -> None:
    message = refusal(checkpoint("tensor"), weight_scale=torch.ones(shape))
    assert f"'{Q}.weight_scale'" in message
    assert str(shape) in message


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (12,), (5, 3), (4, 3, 1), ()])
def test_scales_of_blocks_cover_the_matrix(shape: tuple[int, ...]) -> None:
    message = refusal(checkpoint("block"), weight_scale_inv=torch.ones(shape))
    assert f"'{Q}.weight_scale_inv'" in message
    assert "(4, 3)" in message


@pytest.mark.parametrize("shape", [(64,), (1, 64), (63, 1), ()])
def test_every_output_has_a_scale(shape: tuple[int, ...]) -> None:
    assert "(64, 1)" in refusal(checkpoint("channel"), weight_scale=torch.ones(shape))


def test_a_plain_weight_with_a_scale_is_neither() -> None:
    message = refusal(checkpoint("tensor"), weight=torch.ones(64, 128, dtype=torch.bfloat16))
    assert "float8_e4m3fn" in message
    assert "bfloat16" in message


UNREAD = [
    ({"activation_scheme": "sometimes"}, "activation_scheme should be static or dynamic, found 'sometimes'"),
    ({"activation_scheme": ["static"]}, "activation_scheme"),
    ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "dynamic, beside weight_block_size [128, 128]"),
    ({"weight_block_size": [128]}, "weight_block_size should be two sizes above 0"),
    ({"weight_block_size": [128, 0]}, "weight_block_size"),
    ({"weight_block_size": [128, -1]}, "weight_block_size"),
    ({"weight_block_size": [True, 128]}, "weight_block_size"),
    ({"weight_block_size": [128.0, 128]}, "weight_block_size"),
    ({"weight_block_size": "128x128"}, "weight_block_size"),
    ({"weight_block_size": 128}, "weight_block_size"),
    ({"scale_fmt": "strange"}, "scale_fmt should be ue8m0"),
    ({"fmt": "e5m2"}, "fmt should be e4m3"),
    ({"ignored_layers": "lm_head"}, "ignored_layers should be a list of module names"),
    ({"modules_to_not_convert": [1]}, "modules_to_not_convert should be a list of module names"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": -1.0}, "activation_scale_ub should be a number above 0"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": "high"}, "activation_scale_ub"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": float("nan")}, "activation_scale_ub"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), UNREAD, ids=[str(changes) for changes, _ in UNREAD])
def test_a_config_that_is_not_read_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    sample = checkpoint("tensor")
    with pytest.raises(CheckpointError) as caught:
        Fp8Checkpoint.from_checkpoint({**sample.config, **changes}, sample.view())
    assert named in str(caught.value)
    assert "found" in str(caught.value)


def test_sizes_out_of_all_proportion_allocate_nothing() -> None:
    """A block larger than the matrix is all of it."""
    sample = checkpoint("tensor")
    huge = QuantSample(
        config={**sample.config, "weight_block_size": [10**30, 10**30]},
        tensors=sample.tensors,
        linears=sample.linears,
    )
    form = read(huge, weight_scale=None, weight_scale_inv=sample.tensors[f"{Q}.weight_scale"].view(1, 1))
    assert torch.equal(form.dequantize(), sample.oracle[Q])


@pytest.mark.parametrize(
    "name", ["lm_head", "self_attn.q_proj", "model.layers.0", "model.layers.0.self_attn.q_proj"]
)
@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_a_module_that_is_left_out_is_plain(key: str, name: str) -> None:
    plain = NamedView({f"{Q}.weight": torch.ones(64, 128), "lm_head.weight": torch.ones(16, 64)})
    scheme = Fp8Checkpoint.from_checkpoint({"quant_method": "fp8", key: [name]}, plain)
    module = HEAD if name == "lm_head" else linear(Q, 64, 128)
    assert scheme.tensors(module, plain) == {}
    assert scheme.tensors(module, NamedView({})) == {}


@pytest.mark.parametrize("name", ["q_pro", "model.layers.1", "gate", "0.self_attn.q"])
def test_a_name_means_whole_components(name: str) -> None:
    view = checkpoint("tensor").view()
    config = {"quant_method": "fp8", "ignored_layers": [name]}
    layer = linear("model.layers.10.mlp.gate_proj", 64, 128)
    scheme = Fp8Checkpoint.from_checkpoint(config, view)
    assert scheme.tensors(layer, view)
    assert scheme.tensors(linear(Q, 64, 128), view)


def test_a_module_that_is_left_out_and_quantized_is_refused() -> None:
    sample = checkpoint("tensor")
    view = NamedView(sample.tensors)
    scheme = Fp8Checkpoint.from_checkpoint({**sample.config, "ignored_layers": [Q]}, view)
    with pytest.raises(CheckpointError) as caught:
        scheme.tensors(sample.linears[0], view)
    for part in (FILE, f"'{Q}.weight' should be plain", "found float8_e4m3fn with weight_scale"):
        assert part in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({"quant_method", "fmt", *(key for config in KINDS.values() for key in config)})


@given(changes=st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=2))
def test_whatever_a_config_holds_it_is_read_or_refused(changes: dict[str, Any]) -> None:
    sample = checkpoint("tensor", (linear(Q, 8, 32),))
    config = {**sample.config, **changes}
    other = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
    try:
        scheme = Fp8Checkpoint.from_checkpoint(config, other.view())
        found = scheme.tensors(sample.linears[0], other.view())
        form = read(other) if found else None
    except CheckpointError as error:
        assert "should" in str(error) or "is missing" in str(error)
    else:
        assert form is None or form.shape == (8, 32)
