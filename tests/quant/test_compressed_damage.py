"""compressed-tensors: what is damaged or of another kind is refused, by file, tensor, expected and found."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from compressed_packer import DOWN, HEAD, Q, Recipe, changed, checkpoint
from hypothesis import given
from hypothesis import strategies as st

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, WeightForm
from kvpage.testing.checkpoints import QuantSample, TensorsView, linear
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_compressed.scheme import CompressedTensors

FILE = "model-00001.safetensors"


class NamedView(TensorsView):
    """Tensors of a file with a name."""

    def where(self, name: str) -> str:
        return FILE


class Loading(QuantSchemeConformance):
    scheme = CompressedTensors


def read(sample: QuantSample, **changes: torch.Tensor | None) -> WeightForm:
    """q_proj of the sample, some of its own tensors replaced."""
    replaced = {f"{Q}.{suffix}": tensor for suffix, tensor in changes.items()}
    tensors = {name: t for name, t in {**sample.tensors, **replaced}.items() if t is not None}
    return Loading().load(sample, sample.linears[0], NamedView(tensors))


def opened(config: Mapping[str, Any], view: CheckpointView) -> CompressedTensors:
    return CompressedTensors.from_checkpoint(config, view)


def refusal(sample: QuantSample, **changes: torch.Tensor | None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(sample, **changes)
    return str(caught.value)


def entry(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with another first entry."""
    copied = tensor.clone()
    copied.view(-1)[0] = value
    return copied


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "float-quantized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_scales_are_finite_and_not_negative(form: str, value: float) -> None:
    sample = checkpoint(Recipe(form=form, bits=8))
    message = refusal(sample, weight_scale=entry(sample.tensors[f"{Q}.weight_scale"], value))
    for part in (FILE, f"'{Q}.weight_scale'", "finite scales of at least 0", f"found {value}"):
        assert part in message


def test_a_scale_of_zero_is_an_output_without_weights() -> None:
    sample = checkpoint(Recipe())
    form = read(sample, weight_scale=torch.zeros(64, 4, dtype=torch.bfloat16))
    assert not form.dequantize().any()


def test_a_static_scale_of_activations_is_checked() -> None:
    sample = checkpoint(
        Recipe(form="int-quantized", bits=8, strategy="channel", activations="int", static=True)
    )
    message = refusal(sample, input_scale=torch.tensor([-1.0], dtype=torch.bfloat16))
    assert f"'{Q}.input_scale'" in message
    assert "'model.layers.0.self_attn.q_proj.input_scale' is missing" in refusal(sample, input_scale=None)


def test_weight_shape_must_be_the_models() -> None:
    message = refusal(checkpoint(Recipe()), weight_shape=torch.tensor([128, 64]))
    for part in (FILE, f"'{Q}.weight_shape'", "[64, 128], by config.json", "found [128, 64]"):
        assert part in message


@pytest.mark.parametrize(("index", "found"), [(4, "4"), (-2, "-2"), (2**31 - 1, "2147483647")])
def test_an_index_names_groups_that_are_there(index: int, found: str) -> None:
    sample = checkpoint(Recipe(shuffled=True))
    message = refusal(sample, weight_g_idx=entry(sample.tensors[f"{Q}.weight_g_idx"], index))
    for part in (FILE, f"'{Q}.weight_g_idx'", "groups 0 to 3", f"found {found}"):
        assert part in message


def test_the_index_of_every_input_is_there() -> None:
    sample = checkpoint(Recipe(shuffled=True))
    refusal(sample, weight_g_idx=sample.tensors[f"{Q}.weight_g_idx"][:-1])
    assert "weight_g_idx" in refusal(sample, weight_g_idx=None)


def test_codes_that_have_not_so_few_bits_are_refused() -> None:
    sample = checkpoint(Recipe(form="int-quantized", bits=4))
    message = refusal(sample, weight=entry(sample.tensors[f"{Q}.weight"], 8))
    for part in (FILE, f"'{Q}.weight'", "-8 to 7", "found -8 to 8"):
        assert part in message


def test_zero_points_that_are_no_codes_are_refused() -> None:
    sample = checkpoint(Recipe(bits=4, symmetric=False, int8_zeros=True))
    message = refusal(sample, weight_zero_point=entry(sample.tensors[f"{Q}.weight_zero_point"], -9))
    assert f"'{Q}.weight_zero_point' should hold -8 to 7, found -9 to" in message


def test_a_symmetric_group_may_have_zero_points_of_zero_and_no_others() -> None:
    sample = checkpoint(Recipe())
    zeros = torch.zeros(64, 4, dtype=torch.int8)
    assert torch.equal(read(sample, weight_zero_point=zeros).dequantize(), sample.oracle[Q])
    message = refusal(sample, weight_zero_point=entry(zeros, 1))
    assert (
        f"'{Q}.weight_zero_point' should hold 0 alone, since config group 'group_0' is symmetric" in message
    )


def test_an_asymmetric_group_has_zero_points() -> None:
    message = refusal(checkpoint(Recipe(symmetric=False)), weight_zero_point=None)
    assert "weight_zero_point' is missing" in message


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_not_a_number_in_float_weights_is_refused(byte: int) -> None:
    sample = checkpoint(Recipe(form="float-quantized", bits=8, strategy="channel"))
    codes = entry(sample.tensors[f"{Q}.weight"].view(torch.uint8), byte).view(torch.float8_e4m3fn)
    message = refusal(sample, weight=codes)
    for part in (FILE, f"'{Q}.weight'", "finite numbers", "NaN (byte 0x7F or 0xFF)"):
        assert part in message


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8])
def test_float_weights_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    sample = checkpoint(Recipe(form="float-quantized", bits=8, strategy="channel"))
    message = refusal(sample, weight=sample.tensors[f"{Q}.weight"].view(torch.uint8).view(dtype))
    assert "float8_e4m3fn" in message
    assert str(dtype).removeprefix("torch.") in message


def test_fewer_bits_than_the_config_says_are_refused() -> None:
    sample = checkpoint(Recipe(bits=4))
    eight = QuantSample(
        config=changed(sample.config, weights={"num_bits": 8}), tensors=sample.tensors, linears=sample.linears
    )
    assert "weight_packed" in refusal(eight)


@pytest.mark.parametrize("version", ["0.17.1", "0.19.0", "0.20.1.a20261001", None, "strange"])
@pytest.mark.parametrize("padded", [True, False])
def test_words_are_known_by_their_number_whatever_a_version_from_0_17_on_says(
    version: str | None, padded: bool
) -> None:
    for symmetric in (True, False):
        sample = checkpoint(Recipe(bits=3, padded=padded, symmetric=symmetric))
        config = changed(sample.config, top={"version": version})
        again = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
        assert torch.equal(read(again).dequantize(), sample.oracle[Q])


UNREAD = [
    ({"top": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "sparsity_config"),
    ({"top": {"transform_config": {"config_groups": {"R1": {}}}}}, "transform_config"),
    ({"top": {"quantization_status": "initialized"}}, "initialized"),
    ({"top": {"quantization_status": "calibration"}}, "calibration"),
    ({"top": {"format": "nvfp4-pack-quantized"}}, "4-bit floats with two levels of scales"),
    ({"top": {"format": "mxfp4-pack-quantized"}}, "4-bit floats with shared exponents"),
    ({"top": {"format": "marlin-24"}}, "2:4 sparse weights"),
    ({"top": {"format": "mixed-precision"}}, "several formats"),
    ({"top": {"format": "dense"}}, "stored plain"),
    ({"top": {"format": "new-format"}}, "'new-format'"),
    ({"top": {"format": None}}, "found None"),
    ({"top": {"format": ["pack-quantized"]}}, "format"),
    ({"group": {"format": "nvfp4-pack-quantized"}}, "nvfp4-pack-quantized"),
    ({"group": {"output_activations": {"num_bits": 8}}}, "output_activations"),
    ({"group": {"input_activations": {"num_bits": 4, "type": "int"}}}, "input_activations.num_bits"),
    ({"group": {"input_activations": {"type": "strange"}}}, "input_activations.type"),
    ({"group": {"input_activations": []}}, "input_activations"),
    ({"group": {"weights": []}}, "weights should be an object"),
    ({"weights": {"num_bits": 1}}, "2 to 8"),
    ({"weights": {"num_bits": 9}}, "2 to 8"),
    ({"weights": {"num_bits": True}}, "num_bits"),
    ({"weights": {"num_bits": "4"}}, "num_bits"),
    ({"weights": {"type": "float"}}, "beside format pack-quantized"),
    ({"weights": {"symmetric": None}}, "symmetric"),
    ({"weights": {"dynamic": True}}, "dynamic"),
    ({"weights": {"strategy": "token"}}, "strategy"),
    ({"weights": {"strategy": "tensor_group"}}, "strategy"),
    ({"weights": {"strategy": "block"}}, "strategy"),
    ({"weights": {"strategy": ["group"]}}, "strategy"),
    ({"weights": {"group_size": 0}}, "group_size"),
    ({"weights": {"group_size": "32"}}, "group_size"),
    ({"weights": {"group_size": None}}, "group_size"),
    ({"group": {"targets": None}}, "targets"),
    ({"group": {"targets": "Linear"}}, "targets"),
    ({"group": {"targets": ["re:(("]}}, "regular expression"),
    ({"group": {"targets": ["re:visual.*"]}}, "modules of the checkpoint"),
    ({"group": {"targets": ["Embedding"]}}, "modules of the checkpoint"),
    ({"top": {"ignore": "lm_head"}}, "ignore"),
    ({"top": {"ignore": ["re:*"]}}, "regular expression"),
    ({"top": {"config_groups": {}}}, "config_groups"),
    ({"top": {"config_groups": {"W4A16": ["Linear"]}}}, "config_groups.W4A16"),
]


@pytest.mark.parametrize(("changes", "named"), UNREAD, ids=[str(changes)[5:60] for changes, _ in UNREAD])
def test_a_config_that_is_not_read_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    sample = checkpoint(Recipe())
    with pytest.raises(CheckpointError) as caught:
        opened(changed(sample.config, **changes), sample.view())
    assert named in str(caught.value)
    assert "should be" in str(caught.value)
    assert "found" in str(caught.value)


@pytest.mark.parametrize("structure", [None, [128], [0, 128], [128, 128.0], "0x128", "big", [True, 128], 128])
def test_a_block_has_two_sizes(structure: Any) -> None:
    sample = checkpoint(Recipe(form="float-quantized", bits=8, strategy="block"))
    with pytest.raises(CheckpointError, match="block_structure should be two sizes above 0"):
        opened(changed(sample.config, weights={"block_structure": structure}), sample.view())


def test_a_block_may_be_written_as_the_first_versions_did() -> None:
    sample = checkpoint(Recipe(form="float-quantized", bits=8, strategy="block"))
    config = changed(sample.config, weights={"block_structure": "24x48"})
    again = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
    assert torch.equal(read(again).dequantize(), sample.oracle[Q])


def test_sizes_out_of_all_proportion_allocate_nothing() -> None:
    """A group or a block larger than the matrix is all of it."""
    many = 10**30
    grouped = checkpoint(Recipe(group=512))
    again = QuantSample(
        config=changed(grouped.config, weights={"group_size": many}),
        tensors=grouped.tensors,
        linears=grouped.linears,
    )
    assert torch.equal(read(again).dequantize(), grouped.oracle[Q])
    whole = checkpoint(Recipe(form="float-quantized", bits=8, strategy="tensor"))
    blocks = changed(whole.config, weights={"strategy": "block", "block_structure": [many, many]})
    again = QuantSample(config=blocks, tensors=whole.tensors, linears=whole.linears)
    form = read(again, weight_scale=whole.tensors[f"{Q}.weight_scale"].view(1, 1))
    assert torch.equal(form.dequantize(), whole.oracle[Q])


def two_groups(sample: QuantSample, first: list[str], second: list[str]) -> dict[str, Any]:
    group = sample.config["config_groups"]["group_0"]
    groups = {"group_0": {**group, "targets": first}, "group_1": {**group, "targets": second}}
    return {**sample.config, "config_groups": groups}


def test_two_groups_that_match_one_module_are_refused() -> None:
    sample = checkpoint(Recipe())
    scheme = opened(two_groups(sample, ["Linear"], ["re:.*q_proj"]), sample.view())
    with pytest.raises(CheckpointError) as caught:
        scheme.tensors(sample.linears[0], sample.view())
    assert f"at most one group for '{Q}', found 'group_0, group_1'" in str(caught.value)
    assert scheme.tensors(sample.linears[1], sample.view())


def test_groups_are_told_apart_by_pattern_and_by_name() -> None:
    sample = checkpoint(Recipe())
    eight = checkpoint(Recipe(bits=8))
    config = two_groups(sample, ["re:.*self_attn.*"], [DOWN])
    config["config_groups"]["group_1"]["weights"] = eight.config["config_groups"]["group_0"]["weights"]
    tensors = {name: (eight if name.startswith(DOWN) else sample).tensors[name] for name in sample.tensors}
    mixed = QuantSample(config=config, tensors=tensors, linears=sample.linears)
    for spec, source in zip(sample.linears, (sample, eight), strict=True):
        assert torch.equal(Loading().load(mixed, spec).dequantize(), source.oracle[spec.name])


def test_a_pattern_matches_from_the_start_of_a_name() -> None:
    sample = checkpoint(Recipe())
    with pytest.raises(CheckpointError, match="modules of the checkpoint"):
        opened(changed(sample.config, group={"targets": ["re:q_proj"]}), sample.view())


def test_groups_may_each_have_a_format_of_their_own() -> None:
    sample = checkpoint(Recipe())
    config = changed(sample.config, top={"format": "mixed-precision"}, group={"format": "pack-quantized"})
    again = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
    assert torch.equal(read(again).dequantize(), sample.oracle[Q])


def test_a_dense_sparsity_config_says_nothing() -> None:
    sample = checkpoint(Recipe())
    dense = {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"}
    assert opened(changed(sample.config, top={"sparsity_config": dense}), sample.view())


@pytest.mark.parametrize("ignored", ["lm_head", "re:.*lm_head", "re:lm_"])
def test_a_module_that_is_left_out_is_plain(ignored: str) -> None:
    sample = checkpoint(Recipe())
    scheme = opened(changed(sample.config, top={"ignore": [ignored]}), sample.view())
    assert scheme.tensors(HEAD, sample.view()) == {}
    assert scheme.tensors(HEAD, NamedView({})) == {}


def test_a_plain_weight_without_scale_is_plain_though_no_name_leaves_it_out() -> None:
    sample = checkpoint(Recipe())
    scheme = opened(changed(sample.config, top={"ignore": []}), sample.view())
    assert scheme.tensors(HEAD, sample.view()) == {}


def test_a_module_that_is_left_out_and_quantized_is_refused() -> None:
    sample = checkpoint(Recipe())
    view = NamedView(sample.tensors)
    scheme = opened(changed(sample.config, top={"ignore": [Q]}), view)
    with pytest.raises(CheckpointError) as caught:
        scheme.tensors(sample.linears[0], view)
    for part in (FILE, f"'{Q}' should be plain", "found weight_packed, weight_scale"):
        assert part in str(caught.value)


def test_a_module_that_is_not_in_the_file_is_asked_for() -> None:
    sample = checkpoint(Recipe())
    scheme = opened(sample.config, sample.view())
    other = linear("model.layers.9.self_attn.q_proj", 64, 128)
    assert "weight_packed" in scheme.tensors(other, sample.view())


def test_a_scheme_of_the_cache_is_read_past_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    sample = checkpoint(Recipe())
    with caplog.at_level(logging.INFO, logger="kvpage"):
        opened(sample.config, sample.view())
        assert not caplog.messages
        opened(
            changed(sample.config, top={"kv_cache_scheme": {"num_bits": 8, "type": "float"}}), sample.view()
        )
    assert "kv_cache_scheme" in caplog.text


def test_a_group_without_weights_quantizes_none() -> None:
    """Its activations would be rounded, which kvpage does not do."""
    sample = checkpoint(Recipe())
    scheme = opened(changed(sample.config, group={"weights": None}), sample.view())
    assert scheme.tensors(linear("lm_head", 16, 64), sample.view()) == {}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *(("top", key) for key in checkpoint(Recipe()).config if key != "quant_method"),
    *(("group", key) for key in ("targets", "weights", "input_activations", "output_activations", "format")),
    *(("weights", key) for key in checkpoint(Recipe()).config["config_groups"]["group_0"]["weights"]),
    *(("input_activations", key) for key in ("num_bits", "type", "dynamic", "strategy", "symmetric")),
]


@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ANYTHING), min_size=1, max_size=2))
def test_whatever_a_config_holds_it_is_read_or_refused(changes: list[tuple[tuple[str, str], Any]]) -> None:
    sample = checkpoint(Recipe(activations="int"), (linear(Q, 8, 32),))
    config: dict[str, Any] = dict(sample.config)
    for (part, key), value in changes:
        group = config["config_groups"].get("group_0") if isinstance(config["config_groups"], dict) else None
        inner = group.get(part) if isinstance(group, dict) else None
        if part == "top" or not isinstance(group, dict):
            config[key] = value
        elif part == "group" or isinstance(inner, dict):
            config = changed(config, **{part: {key: value}})
    other = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
    try:
        found = opened(config, other.view()).tensors(sample.linears[0], other.view())
        form = read(other) if found else None
    except CheckpointError as error:
        assert "should" in str(error) or "is missing" in str(error)
    else:
        assert form is None or form.shape == (8, 32)


@pytest.mark.parametrize(
    ("version", "padded"), [("0.8.1", True), ("0.17.1", True), ("0.19.0", False), (None, False)]
)
def test_where_the_number_of_words_is_the_same_the_version_decides(version: str | None, padded: bool) -> None:
    """20 values of 3 bits take two words in both layouts."""
    sample = checkpoint(Recipe(bits=3, padded=padded), (linear(Q, 7, 20),))
    config = changed(sample.config, top={"version": version})
    again = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
    assert torch.equal(read(again).dequantize(), sample.oracle[Q])


def test_where_the_weights_words_do_not_tell_those_of_the_zero_points_do() -> None:
    """96 outputs of 3 bits take ten padded words and nine others."""
    for padded in (True, False):
        sample = checkpoint(Recipe(bits=3, padded=padded, symmetric=False), (linear(Q, 96, 20),))
        config = changed(sample.config, top={"version": "0.17.1"})
        again = QuantSample(config=config, tensors=sample.tensors, linears=sample.linears)
        assert torch.equal(read(again).dequantize(), sample.oracle[Q])


def test_too_few_words_of_an_old_version_are_refused() -> None:
    """As many as values that straddle would take."""
    sample = checkpoint(Recipe(bits=3, padded=True))
    message = refusal(sample, weight_packed=sample.tensors[f"{Q}.weight_packed"][:, :-1])
    assert f"'{Q}.weight_packed'" in message
