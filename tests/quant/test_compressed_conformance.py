"""compressed-tensors: what llm-compressor wrote, and every layout of the format, is read bit for bit."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_packer import BLOCK, DOWN, Q, Recipe, changed, checkpoint, pack_rows
from hypothesis import given
from hypothesis import strategies as st

from kvpage import CheckpointError
from kvpage.api.quant import ChannelInt8, Fp8, GroupedInt, LinearSpec, WeightForm
from kvpage.loading.quantized import sketch
from kvpage.testing.checkpoints import QuantSample, linear, read_folder
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_compressed.packing import unpack, words
from kvpage_compressed.scheme import CompressedTensors

DATA = Path(__file__).resolve().parents[1] / "data" / "quant"
VECTORS = sorted(path.name for path in DATA.glob("ct-*"))


def shape_of(module: str, tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    if f"{module}.weight_shape" in tensors:
        return tuple(tensors[f"{module}.weight_shape"].tolist())
    return tuple(tensors[f"{module}.weight"].shape)


@functools.cache
def vector(name: str) -> QuantSample:
    config, tensors = read_folder(DATA / name)
    hashes = json.loads((DATA / name / "oracle.json").read_text(encoding="utf-8"))
    modules = [weight.removesuffix(".weight") for weight in hashes]
    linears = [linear(module, *shape_of(module, tensors)) for module in modules]
    with np.load(DATA / name / "oracle.npz") as arrays:
        oracle = {
            module: torch.from_numpy(arrays[f"w:{module}.weight"])
            for module in modules
            if f"w:{module}.weight" in arrays
        }
    plain = (linear("lm_head", 512, 128, "head.weight"),)
    return QuantSample(
        config=config, tensors=tensors, linears=tuple(linears), oracle=oracle, plain=plain,
        wrong_configs=(changed(config, weights={"num_bits": 9}), changed(config, group={"format": "marlin-24"})),
    )  # fmt: skip


def recipes() -> Iterable[Recipe]:
    for bits in range(2, 9):
        for padded in (False, True) if 32 % bits else (False,):
            yield Recipe(bits=bits, padded=padded)
            yield Recipe(bits=bits, padded=padded, symmetric=False)
    for bits in (3, 4, 8):
        for strategy in ("channel", "tensor"):
            yield Recipe(bits=bits, strategy=strategy)
            yield Recipe(bits=bits, strategy=strategy, symmetric=False)
    for bits in (4, 8):
        yield Recipe(
            bits=bits, symmetric=False, group=96
        )  # two groups: each of two ranks has a column of zeros
    yield Recipe(symmetric=False, int8_zeros=True, scales=torch.float16)
    for bits in (2, 3, 4, 8):
        yield Recipe(bits=bits, symmetric=bits == 3, shuffled=True)
    yield Recipe(form="int-quantized", bits=8, strategy="channel", activations="int")
    yield Recipe(form="int-quantized", bits=8, strategy="tensor", activations="int", static=True)
    yield Recipe(form="int-quantized", bits=8, strategy="channel", symmetric=False, activations="int")
    yield Recipe(form="int-quantized", bits=8, strategy="group", scales=torch.float32)
    yield Recipe(form="int-quantized", bits=4, strategy="group", activations="int")
    yield Recipe(form="naive-quantized", bits=6, strategy="channel")
    for strategy in ("tensor", "channel", "group", "block"):
        yield Recipe(form="float-quantized", bits=8, strategy=strategy, activations="float")
    yield Recipe(form="float-quantized", bits=8, strategy="tensor", activations="float", static=True)


@functools.cache
def packed_here() -> dict[str, QuantSample]:
    return {str(recipe): checkpoint(recipe) for recipe in recipes()}


def read(sample: QuantSample, spec: LinearSpec | None = None) -> WeightForm:
    return TestOwnPacker().load(sample, spec or sample.linears[0])


def stands_for(form: WeightForm) -> tuple[object, ...]:
    kind: tuple[object, ...] = (type(form), getattr(form, "group", None), getattr(form, "bits", None))
    return (*kind, *((tuple(tensor.shape), tensor.dtype) for tensor in form.tensors()))


class TestRealCheckpoints(QuantSchemeConformance):
    scheme = CompressedTensors

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        for name in VECTORS:
            yield name, vector(name)


class TestOwnPacker(QuantSchemeConformance):
    scheme = CompressedTensors

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from packed_here().items()


def test_the_vectors_of_all_formats_are_there() -> None:
    formats = {vector(name).config["format"] for name in VECTORS}
    assert formats == {"pack-quantized", "int-quantized", "float-quantized"}


@pytest.mark.parametrize("name", VECTORS)
def test_the_bytes_of_every_matrix_have_the_stated_hash(name: str) -> None:
    hashes = json.loads((DATA / name / "oracle.json").read_text(encoding="utf-8"))
    sample = vector(name)
    for spec in sample.linears:
        found = read(sample, spec).dequantize().numpy().astype("<f4").tobytes()
        assert hashlib.sha256(found).hexdigest() == hashes[f"{spec.name}.weight"]


@pytest.mark.parametrize("name", [*VECTORS, *(str(recipe) for recipe in recipes())])
def test_the_sketch_has_the_shapes_and_dtypes_of_the_form(name: str) -> None:
    sample = vector(name) if name in VECTORS else packed_here()[name]
    scheme = CompressedTensors.from_checkpoint(sample.config, sample.view())
    for spec in sample.linears:
        planned = sketch(scheme, spec, sample.view())
        assert planned is not None
        assert stands_for(planned) == stands_for(read(sample, spec))
        assert {tensor.device.type for tensor in planned.tensors()} == {"meta"}


def test_an_index_that_is_not_as_it_should_be_is_refused_before_a_sketch() -> None:
    sample = checkpoint(Recipe(shuffled=True))
    scheme = CompressedTensors.from_checkpoint(sample.config, sample.view())
    index = sample.tensors[f"{Q}.weight_g_idx"]
    for damaged in (None, index[:-1], index.long()):
        view = sample.view(**{f"{Q}.weight_g_idx": damaged})
        with pytest.raises(CheckpointError, match="weight_g_idx"):
            sketch(scheme, sample.linears[0], view)


@given(
    bits=st.integers(2, 8),
    padded=st.booleans(),
    out=st.integers(1, 40),
    inputs=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_gives_back_what_was_packed(bits: int, padded: bool, out: int, inputs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (out, inputs))
    packed = torch.from_numpy(pack_rows(codes, bits, padded=padded))
    assert packed.shape == (out, words(inputs, bits, padded=padded))
    assert torch.equal(unpack(packed, inputs, bits, padded=padded), torch.from_numpy(codes).byte())


@given(
    recipe=st.builds(
        Recipe,
        bits=st.integers(2, 8),
        strategy=st.sampled_from(("group", "channel", "tensor")),
        symmetric=st.booleans(),
        group=st.sampled_from((1, 8, 16, 32, 48, 1000)),
        padded=st.booleans(),
        int8_zeros=st.booleans(),
        scales=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    ),
    out=st.integers(1, 50),
    inputs=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_packed_matrix_is_exact(recipe: Recipe, out: int, inputs: int, seed: int) -> None:
    """Sizes that no word and no group divides too: of these the version says how they are packed."""
    sample = checkpoint(recipe, (linear(Q, out, inputs),), seed)
    assert torch.equal(read(sample).dequantize(), sample.oracle[Q])


@given(
    out=st.integers(1, 60),
    inputs=st.integers(1, 150),
    strategy=st.sampled_from(("tensor", "channel", "group", "block")),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_of_floats_is_exact(out: int, inputs: int, strategy: str, seed: int) -> None:
    recipe = Recipe(form="float-quantized", bits=8, strategy=strategy, activations="float")
    sample = checkpoint(recipe, (linear(Q, out, inputs),), seed)
    assert torch.equal(read(sample).dequantize(), sample.oracle[Q])


@given(bits=st.sampled_from((2, 3, 4, 5, 8)), symmetric=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_inputs_in_any_order_come_back_in_their_places(bits: int, symmetric: bool, seed: int) -> None:
    """Also where the last group is short."""
    recipe = Recipe(bits=bits, symmetric=symmetric, shuffled=True, group=16)
    sample = checkpoint(recipe, (linear(Q, 24, 72),), seed)
    assert torch.equal(read(sample).dequantize(), sample.oracle[Q])


def test_groups_are_in_the_order_of_a_stable_sort() -> None:
    sample = checkpoint(Recipe(shuffled=True))
    form = read(sample)
    assert isinstance(form, GroupedInt)
    assert form.permutation is not None
    order = sample.tensors[f"{Q}.weight_g_idx"].argsort(stable=True).to(torch.int32)
    assert torch.equal(form.permutation, order)
    assert form.group == 32


def test_an_index_in_order_or_never_set_needs_no_permutation() -> None:
    sample = checkpoint(Recipe())
    for index in (torch.arange(128) // 32, torch.full((128,), -1)):
        form = CompressedTensors.from_checkpoint(sample.config, sample.view())
        view = sample.view(**{f"{Q}.weight_g_idx": index.to(torch.int32)})
        loaded = TestOwnPacker().load(sample, sample.linears[0], view)
        assert isinstance(loaded, GroupedInt)
        assert loaded.permutation is None
        assert torch.equal(loaded.dequantize(), sample.oracle[Q])
        assert "weight_g_idx" in form.tensors(sample.linears[0], view)


@pytest.mark.parametrize(
    ("recipe", "form", "bits", "activation"),
    [
        (Recipe(bits=2), GroupedInt, 4, "per-group"),
        (Recipe(bits=4), GroupedInt, 4, "per-group"),
        (Recipe(bits=4, strategy="channel", symmetric=False), GroupedInt, 4, "per-group"),
        (Recipe(bits=6), GroupedInt, 8, "none"),
        (Recipe(bits=8, symmetric=False, strategy="channel"), GroupedInt, 8, "none"),
        (Recipe(bits=8, group=512), ChannelInt8, None, "none"),
        (Recipe(bits=8, strategy="channel"), ChannelInt8, None, "none"),
        (
            Recipe(form="int-quantized", bits=8, strategy="channel", activations="int"),
            ChannelInt8,
            None,
            "per-token",
        ),
        (
            Recipe(form="float-quantized", bits=8, strategy="block", activations="float"),
            Fp8,
            None,
            None,
        ),
    ],
    ids=str,
)
def test_the_form_is_as_small_as_its_bits(
    recipe: Recipe, form: type[WeightForm], bits: int | None, activation: str | None
) -> None:
    found = read(checkpoint(recipe))
    assert type(found) is form
    assert getattr(found, "bits", None) == bits
    assert getattr(found, "activation", None) == activation


def test_symmetric_weights_have_no_zeros_and_four_bits_take_half_a_byte() -> None:
    form = read(checkpoint(Recipe(bits=4)))
    assert isinstance(form, GroupedInt)
    assert form.zeros is None
    assert form.zero == 8
    assert form.nbytes == 64 * 128 // 2 + 64 * 4 * 2


def test_a_block_of_scales_is_repeated_for_its_outputs() -> None:
    form = read(checkpoint(Recipe(form="float-quantized", bits=8, strategy="block")))
    assert isinstance(form, Fp8)
    assert form.group == BLOCK[1]
    assert form.scales.shape == (64, 3)
    assert torch.equal(form.scales[0], form.scales[BLOCK[0] - 1])
    assert not torch.equal(form.scales[0], form.scales[BLOCK[0]])


@pytest.mark.parametrize(
    ("recipe", "cut"),
    [
        (Recipe(bits=4, symmetric=False), {Q: 0, DOWN: 1}),
        (Recipe(bits=8, strategy="channel"), {Q: 0, DOWN: 1}),
        (Recipe(bits=3), {Q: 0, DOWN: None}),
        (Recipe(bits=3, symmetric=False), {Q: None, DOWN: None}),
        (Recipe(shuffled=True), {Q: 0, DOWN: None}),
        (Recipe(form="float-quantized", bits=8, strategy="block"), {Q: None, DOWN: 1}),
    ],
    ids=str,
)
def test_ranks_cut_the_file_where_nothing_straddles(recipe: Recipe, cut: dict[str, int | None]) -> None:
    sample = checkpoint(recipe)
    scheme = CompressedTensors.from_checkpoint(sample.config, sample.view())
    for spec in sample.linears:
        specs = scheme.tensors(spec, sample.view())
        assert specs["weight_packed" if "weight_packed" in specs else "weight"].shard_dim == cut[spec.name]
        if cut[spec.name] is None:
            assert {tensor.shard_dim for tensor in specs.values()} == {None}


@pytest.mark.parametrize("targets", [["Embedding", "Linear"], ["Linear", "re:.*embed_tokens"]])
def test_a_packed_token_embedding_is_read_where_a_group_targets_it(targets: list[str]) -> None:
    table = linear("model.embed_tokens", 48, 64, "embed.weight")
    sample = checkpoint(Recipe(), (table, linear(Q, 24, 64)))
    sample.config["config_groups"]["group_0"]["targets"] = targets
    assert torch.equal(read(sample, table).dequantize(), sample.oracle[table.name])


def test_linear_does_not_mean_the_token_embedding() -> None:
    table = linear("model.embed_tokens", 48, 64, "embed.weight")
    sample = checkpoint(Recipe(), (table, linear(Q, 24, 64)))
    with pytest.raises(
        CheckpointError, match=r"'model\.embed_tokens' should be plain, since quantization_config"
    ):
        read(sample, table)


def test_a_plain_token_embedding_stays_plain() -> None:
    table = linear("model.embed_tokens", 48, 64, "embed.weight")
    sample = checkpoint(Recipe(), (linear(Q, 24, 64),))
    view = sample.view(**{f"{table.name}.weight": torch.zeros(48, 64)})
    assert not CompressedTensors.from_checkpoint(sample.config, view).tensors(table, view)
