"""fp8 and fbgemm_fp8: what real tools wrote, and every kind of scale, is read bit for bit."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_packer import e4m3
from hypothesis import given
from hypothesis import strategies as st

from kvpage.api.quant import Fp8, LinearSpec
from kvpage.loading.quantized import sketch
from kvpage.testing.checkpoints import QuantSample, linear, read_folder
from kvpage.testing.quantization import QuantSchemeConformance
from kvpage_fp8.scheme import Fp8Checkpoint

DATA = Path(__file__).resolve().parents[1] / "data" / "quant"
VECTORS = sorted(path.name for pattern in ("fp8-*", "fbgemm-*") for path in DATA.glob(pattern))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
HEAD = linear("lm_head", 16, 64, "head.weight")
MATRICES = (linear(Q, 64, 128), linear(DOWN, 96, 192))
KINDS: dict[str, dict[str, Any]] = {
    "tensor": {"activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
    "tensor-static": {"activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"},
    "tensor-transformers": {"activation_scheme": "static", "weight_block_size": None, "dequantize": False},
    "block": {"activation_scheme": "dynamic", "weight_block_size": [16, 48], "fmt": "e4m3"},
    "block-partial": {"weight_block_size": [40, 80], "modules_to_not_convert": ["lm_head"]},
    "block-larger": {"weight_block_size": [128, 256], "activation_scheme": "dynamic"},
    "block-e8m0": {"weight_block_size": [32, 48], "scale_fmt": "ue8m0", "activation_scheme": "dynamic"},
    "channel": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip


def stored(
    kind: str, config: dict[str, Any], out: int, inputs: int, generator: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({suffix: tensor}, float32 [out, in]) of a random matrix, element by element as the format is described."""
    codes = generator.integers(0, 256, (out, inputs), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x00
    rows, columns = config.get("weight_block_size") or ((1, inputs) if kind == "channel" else (out, inputs))
    shape = (-(-out // rows), -(-inputs // columns))
    grid = generator.random(shape, np.float32) * 0.01
    scale = torch.from_numpy(grid)
    if kind == "block-e8m0":
        exponents = generator.integers(100, 140, shape, np.uint8)
        scale = torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
        grid = np.exp2(exponents.astype(np.float32) - 127)
    tensors = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn)}
    if kind.startswith("tensor"):
        scale = scale.reshape(())
    tensors["weight_scale_inv" if "block" in kind or "transformers" in kind else "weight_scale"] = scale
    if config.get("activation_scheme") == "static":
        name = "activation_scale" if "transformers" in kind else "input_scale"
        tensors[name] = torch.tensor(0.5)
    spread = grid[np.arange(out) // rows][:, np.arange(inputs) // columns]
    return tensors, torch.from_numpy(e4m3(codes) * spread)


def checkpoint(
    kind: str, specs: tuple[LinearSpec, ...] = MATRICES, seed: int = 0, block: list[int] | None = None
) -> QuantSample:
    config = {"quant_method": "fp8", **KINDS[kind], **({"weight_block_size": block} if block else {})}
    generator = np.random.default_rng(seed)
    tensors = {"lm_head.weight": torch.ones(HEAD.out_features, HEAD.in_features, dtype=torch.bfloat16)}
    oracle = {}
    for spec in specs:
        parts, oracle[spec.name] = stored(kind, config, spec.out_features, spec.in_features, generator)
        tensors.update({f"{spec.name}.{suffix}": tensor for suffix, tensor in parts.items()})
    return QuantSample(config=config, tensors=tensors, linears=specs, oracle=oracle, plain=(HEAD,))


@functools.cache
def vector(name: str) -> QuantSample:
    config, tensors = read_folder(DATA / name)
    hashes = json.loads((DATA / name / "oracle.json").read_text(encoding="utf-8"))
    modules = [weight.removesuffix(".weight") for weight in hashes]
    linears = tuple(linear(module, *tensors[f"{module}.weight"].shape) for module in modules)
    with np.load(DATA / name / "oracle.npz") as arrays:
        oracle = {
            module: torch.from_numpy(arrays[f"w:{module}.weight"])
            for module in modules
            if f"w:{module}.weight" in arrays
        }
    plain = (linear("lm_head", 512, 128, "head.weight"),)
    wrong: tuple[dict[str, Any], ...] = ({**config, "weight_block_size": [64, 64], "quant_method": "fp8"},)
    return QuantSample(
        config=config, tensors=tensors, linears=linears, oracle=oracle, plain=plain, wrong_configs=wrong
    )


@functools.cache
def packed_here() -> dict[str, QuantSample]:
    return {kind: checkpoint(kind) for kind in KINDS}


def read(sample: QuantSample, spec: LinearSpec | None = None) -> Fp8:
    form = TestOwnPacker().load(sample, spec or sample.linears[0])
    assert isinstance(form, Fp8)
    return form


class TestRealCheckpoints(QuantSchemeConformance):
    scheme = Fp8Checkpoint

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        for name in VECTORS:
            yield name, vector(name)


class TestOwnPacker(QuantSchemeConformance):
    scheme = Fp8Checkpoint

    def samples(self) -> Iterable[tuple[str, QuantSample]]:
        yield from packed_here().items()


def test_the_vectors_of_all_kinds_are_there() -> None:
    kinds = {
        (vector(n).config["quant_method"], bool(vector(n).config.get("weight_block_size"))) for n in VECTORS
    }
    assert kinds == {("fp8", False), ("fp8", True), ("fbgemm_fp8", False)}


@pytest.mark.parametrize("name", VECTORS)
def test_the_bytes_of_every_matrix_have_the_stated_hash(name: str) -> None:
    hashes = json.loads((DATA / name / "oracle.json").read_text(encoding="utf-8"))
    sample = vector(name)
    for spec in sample.linears:
        found = read(sample, spec).dequantize().numpy().astype("<f4").tobytes()
        assert hashlib.sha256(found).hexdigest() == hashes[f"{spec.name}.weight"]


@pytest.mark.parametrize("name", [*VECTORS, *KINDS])
def test_the_sketch_has_the_shapes_and_dtypes_of_the_form(name: str) -> None:
    sample = vector(name) if name in VECTORS else packed_here()[name]
    scheme = Fp8Checkpoint.from_checkpoint(sample.config, sample.view())
    for spec in sample.linears:
        planned, form = sketch(scheme, spec, sample.view()), read(sample, spec)
        assert isinstance(planned, Fp8)
        assert planned.group == form.group
        for empty, held in zip(planned.tensors(), form.tensors(), strict=True):
            assert (empty.shape, empty.dtype) == (held.shape, held.dtype)
            assert empty.is_meta


@given(
    kind=st.sampled_from(("block", "block-e8m0")),
    out=st.integers(1, 70),
    inputs=st.integers(1, 150),
    block=st.lists(st.integers(1, 80), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_in_any_blocks_is_exact(
    kind: str, out: int, inputs: int, block: list[int], seed: int
) -> None:
    sample = checkpoint(kind, (linear(Q, out, inputs),), seed, block)
    assert torch.equal(read(sample).dequantize(), sample.oracle[Q])


@given(
    kind=st.sampled_from([kind for kind in KINDS if "block" not in kind]),
    out=st.integers(1, 40),
    inputs=st.integers(1, 90),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_with_a_scale_a_tensor_or_an_output_is_exact(
    kind: str, out: int, inputs: int, seed: int
) -> None:
    sample = checkpoint(kind, (linear(Q, out, inputs),), seed)
    assert torch.equal(read(sample).dequantize(), sample.oracle[Q])


def test_every_byte_that_is_a_number_is_decoded() -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    tensors = {
        f"{Q}.weight": torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).view(1, -1),
        f"{Q}.weight_scale": torch.tensor(1.0),
    }
    sample = QuantSample(
        config={"quant_method": "fp8", "activation_scheme": "dynamic"},
        tensors=tensors,
        linears=(linear(Q, 1, codes.size),),
    )
    values = read(sample).dequantize()[0]
    assert torch.equal(values, torch.from_numpy(e4m3(codes)))
    assert values.abs().max() == 448


def test_a_fused_matrix_has_one_scale() -> None:
    """A checkpoint whose q, k and v are one module."""
    fused = LinearSpec(
        name="model.layers.0.self_attn.qkv_proj",
        parameters=tuple(f"layers.0.attention.{part}.weight" for part in "qkv"),
        in_features=64,
        out_features=96,
    )
    sample = checkpoint("tensor-static", (fused,))
    assert torch.equal(read(sample).dequantize(), sample.oracle[fused.name])


def test_a_scale_may_have_any_shape_of_one_number_and_any_floating_dtype() -> None:
    sample = checkpoint("tensor")
    for shape in ((1,), (1, 1)):
        scale = torch.full(shape, 0.25, dtype=torch.bfloat16)
        view = sample.view(**{f"{Q}.weight_scale": scale})
        form = TestOwnPacker().load(sample, sample.linears[0], view)
        assert torch.equal(form.dequantize(), sample.tensors[f"{Q}.weight"].float() * 0.25)


def test_scales_of_a_tensor_and_of_blocks_are_repeated_for_each_output() -> None:
    whole, blocks = read(packed_here()["tensor"]), read(packed_here()["block"])
    assert (whole.scales.shape, whole.group) == ((64, 1), 128)
    assert (blocks.scales.shape, blocks.group) == ((64, 3), 48)
    assert whole.scales.dtype == blocks.scales.dtype == torch.float32
    assert torch.equal(blocks.scales[0], blocks.scales[15])
    assert not torch.equal(blocks.scales[15], blocks.scales[16])


def test_a_matrix_that_its_blocks_do_not_divide_may_be_plain() -> None:
    """transformers leaves such ones out without a word in the config."""
    sample = checkpoint("block")
    weight = torch.ones(96, 192, dtype=torch.bfloat16)
    view = sample.view(**{f"{DOWN}.weight": weight, f"{DOWN}.weight_scale_inv": None})
    scheme = Fp8Checkpoint.from_checkpoint(sample.config, view)
    assert scheme.tensors(sample.linears[1], view) == {}
    assert scheme.tensors(sample.linears[0], view)


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("tensor", {Q: (0, None), DOWN: (1, None)}),
        ("channel", {Q: (0, 0), DOWN: (1, None)}),
        ("block", {Q: (0, 0), DOWN: (1, 1)}),
        ("block-partial", {Q: (None, None), DOWN: (None, None)}),
    ],
)
def test_ranks_cut_whole_blocks(kind: str, cut: dict[str, tuple[int | None, int | None]]) -> None:
    sample = packed_here()[kind]
    scheme = Fp8Checkpoint.from_checkpoint(sample.config, sample.view())
    for spec in sample.linears:
        weight, scale = scheme.tensors(spec, sample.view()).values()
        assert (weight.shard_dim, scale.shard_dim) == cut[spec.name]
