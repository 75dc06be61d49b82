"""compressed-tensors checkpoints of two matrices, packed with numpy from the format's description: bit by bit, so that
it shares nothing with the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvpage.api.quant import LinearSpec
from kvpage.testing.checkpoints import QuantSample, linear

BLOCK = (24, 48)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
HEAD = linear("lm_head", 16, 64, "head.weight")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to store a matrix; ``padded``: whole values a word. ``shuffled``: inputs in any order (weight_g_idx)."""

    bits: int = 4
    strategy: str = "group"
    symmetric: bool = True
    form: str = "pack-quantized"
    group: int = 32
    padded: bool = False
    shuffled: bool = False
    int8_zeros: bool = False
    activations: str | None = None
    static: bool = False
    scales: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        zeros = "sym" if self.symmetric else "asym-int8" if self.int8_zeros else "asym"
        layout = "-padded" if self.padded else ""
        order = "-g_idx" if self.shuffled else ""
        made_for = f"-{self.activations}" if self.activations else ""
        size = f"{self.group}" if self.strategy == "group" else ""
        return f"{self.form}-w{self.bits}-{zeros}-{self.strategy}{size}{layout}{order}{made_for}"


def pack_rows(codes: np.ndarray, bits: int, *, padded: bool) -> np.ndarray:
    """codes [rows, count] of 0 to 2**bits - 1 -> int32 [rows, words]."""
    rows, count = codes.shape
    in_word = 32 // bits if padded else 32
    wide = 32 if padded else 32 * bits  # bits of so many values
    runs = -(-count // in_word)
    values = np.zeros((rows, runs * in_word), np.int64)
    values[:, :count] = codes
    each = (values[:, :, None] >> np.arange(bits)) & 1
    stream = np.zeros((rows, runs, wide), np.uint8)
    stream[:, :, : in_word * bits] = each.reshape(rows, runs, in_word * bits)
    words = np.packbits(stream.reshape(rows, runs * wide), axis=1, bitorder="little").view("<i4")
    return np.ascontiguousarray(words[:, : runs if padded else -(-count * bits // 32)])


def config_of(recipe: Recipe) -> dict[str, Any]:
    floats = recipe.form == "float-quantized"
    weights: dict[str, Any] = {
        "num_bits": recipe.bits, "type": "float" if floats else "int", "symmetric": recipe.symmetric,
        "strategy": recipe.strategy, "group_size": recipe.group if recipe.strategy == "group" else None,
        "block_structure": list(BLOCK) if recipe.strategy == "block" else None, "dynamic": False,
        "actorder": "group" if recipe.shuffled else None,
    }  # fmt: skip
    activations = None
    if recipe.activations:
        dynamic = not recipe.static
        activations = {
            "num_bits": 8, "type": recipe.activations, "symmetric": True, "dynamic": dynamic,
            "strategy": "token" if dynamic else "tensor",
        }  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": recipe.form, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.7.nothing"], "quantization_status": "compressed", "kv_cache_scheme": None,
        "sparsity_config": {}, "transform_config": {}, "version": "0.12.2" if recipe.padded else "0.19.0",
    }  # fmt: skip


def stored(
    recipe: Recipe, out: int, inputs: int, generator: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({suffix: tensor}, float32 [out, in]) of a random matrix."""
    if recipe.strategy == "tensor":
        rows, columns, scale_shape = out, inputs, (1,)
    else:
        rows, columns = {"channel": (1, inputs), "group": (1, recipe.group), "block": BLOCK}[recipe.strategy]
        scale_shape = (-(-out // rows), -(-inputs // columns))
    scale = torch.from_numpy(generator.random(scale_shape, np.float32) * 0.02).to(recipe.scales)
    grid = scale.float().numpy().reshape(scale_shape if len(scale_shape) == 2 else (1, 1))
    down, across = np.arange(out) // rows, np.arange(inputs) // columns
    tensors = {"weight_scale": scale}
    if recipe.shuffled:
        across = generator.permutation(across)
        tensors["weight_g_idx"] = torch.from_numpy(across.astype(np.int32))
    scales = grid[down][:, across]
    if recipe.static:
        tensors["input_scale"] = torch.ones(1, dtype=recipe.scales)
    if recipe.form == "float-quantized":
        codes = generator.integers(0, 256, (out, inputs), np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x7E
        weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return {**tensors, "weight": weight}, torch.from_numpy(e4m3(codes) * scales)
    half = 2 ** (recipe.bits - 1)
    q = generator.integers(-half, half, (out, inputs))
    zero = generator.integers(-half, half, grid.shape)
    if recipe.symmetric:
        zero[:] = 0
    elif recipe.strategy == "tensor":
        tensors["weight_zero_point"] = torch.from_numpy(zero.astype(np.int8).reshape(1))
    elif recipe.int8_zeros or recipe.form != "pack-quantized":
        tensors["weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
    else:
        packed = pack_rows((zero + half).T, recipe.bits, padded=recipe.padded)
        tensors["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(packed.T))
    if recipe.form == "pack-quantized":
        tensors["weight_packed"] = torch.from_numpy(pack_rows(q + half, recipe.bits, padded=recipe.padded))
        tensors["weight_shape"] = torch.tensor([out, inputs])
    else:
        tensors["weight"] = torch.from_numpy(q.astype(np.int8))
    return tensors, torch.from_numpy((q - zero[down][:, across]).astype(np.float32) * scales)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Byte by byte: a sign, four bits of exponent (bias 7), three of fraction; exponent 0 is subnormal."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, fraction = (codes >> 3 & 15).astype(np.int64), (codes & 7) / 8.0
    magnitude = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 7), fraction * 2.0**-6)
    return (sign * magnitude).astype(np.float32)


def checkpoint(
    recipe: Recipe, specs: tuple[LinearSpec, ...] = (linear(Q, 64, 128), linear(DOWN, 96, 192)), seed: int = 0
) -> QuantSample:
    """A checkpoint of ``specs`` and of a plain head, with its oracle."""
    generator = np.random.default_rng(seed)
    tensors = {f"{HEAD.name}.weight": torch.ones(HEAD.out_features, HEAD.in_features, dtype=torch.bfloat16)}
    oracle = {}
    for spec in specs:
        parts, oracle[spec.name] = stored(recipe, spec.out_features, spec.in_features, generator)
        tensors.update({f"{spec.name}.{suffix}": tensor for suffix, tensor in parts.items()})
    return QuantSample(config=config_of(recipe), tensors=tensors, linears=specs, oracle=oracle, plain=(HEAD,))


def changed(
    config: Mapping[str, Any], top: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A config of one group with other keys: of ``top``, of the "group", of its "weights" or "input_activations"."""
    group = {**config["config_groups"]["group_0"], **changes.pop("group", {})}
    for part, keys in changes.items():
        group[part] = {**group[part], **keys}
    return {**config, "config_groups": {"group_0": group}, **(top or {})}
