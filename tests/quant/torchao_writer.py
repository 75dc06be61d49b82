"""Checkpoints as torchao's safetensors support takes tensor subclasses apart, made with numpy from its description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvpage.testing.checkpoints import QuantSample, linear

CONFIG = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2}},
}
PER_ROW = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a weight is quantized: ``block`` (outputs, inputs) share a scale, 0 = all of them."""

    kind: str = "IntxUnpackedToInt8Tensor"
    bits: int = 4
    block: tuple[int, int] = (1, 32)
    symmetric: bool = False
    scales: torch.dtype = torch.bfloat16
    zeros: torch.dtype = torch.int8
    activations: bool = False
    static: bool = False


@dataclass(frozen=True, kw_only=True)
class Stored:
    """tensors by suffix, what the header says, and the float32 values [out, in]."""

    tensors: Mapping[str, torch.Tensor]
    said: Mapping[str, Any]
    values: np.ndarray


def stored(outputs: int, inputs: int, recipe: Recipe) -> Stored:
    generator = np.random.default_rng([outputs, inputs, recipe.bits])
    rows, group = recipe.block[0] or outputs, recipe.block[1] or inputs
    grid = (outputs // rows, inputs // group)
    scale = torch.from_numpy(generator.random(grid, np.float32) + np.float32(0.01)).to(recipe.scales)
    tensors = {"_weight_scale": scale}
    data: dict[str, Any] = {
        "block_size": [rows, group],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
    }
    down, across = np.arange(outputs) // rows, np.arange(inputs) // group
    scales = scale.float().numpy()[down][:, across]
    if recipe.kind == "Float8Tensor":
        codes = torch.from_numpy(generator.normal(0, 100, (outputs, inputs)).astype(np.float32))
        tensors["_weight_qdata"] = codes.to(torch.float8_e4m3fn)
        values = tensors["_weight_qdata"].float().numpy() * scales
        data |= {"mm_config": None, "act_quant_kwargs": PER_ROW if recipe.activations else None}
    else:
        half = 2 ** (recipe.bits - 1)
        q = generator.integers(-half, half, (outputs, inputs))
        zero = np.zeros(grid, int) if recipe.symmetric else generator.integers(-half, half, grid)
        tensors["_weight_qdata"] = torch.from_numpy(q.astype(np.int8))
        tensors["_weight_zero_point"] = torch.from_numpy(zero).to(recipe.zeros)
        values = (q - zero[down][:, across]).astype(np.float32) * scales
        if recipe.kind == "Int8Tensor":
            data |= {"act_quant_kwargs": PER_ROW if recipe.activations else None, "reduce_range": False}
        else:
            data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{recipe.bits}"}
            data["activation_quantization"] = "int8_asym_per_token" if recipe.activations else None
    if recipe.static:
        tensors["_weight_act_quant_scale"] = torch.ones(1, 1)
    names = [suffix.removeprefix("_weight_") for suffix in tensors]
    return Stored(
        tensors=tensors,
        said={"_type": recipe.kind, "_data": data, "_tensor_data_names": names},
        values=values,
    )


def sample(modules: Mapping[str, Stored], config: Mapping[str, Any] = CONFIG, **more: Any) -> QuantSample:
    """A checkpoint of those modules, with a plain lm_head."""
    tensors = {f"{name}.{suffix}": t for name, own in modules.items() for suffix, t in own.tensors.items()}
    tensors["lm_head.weight"] = torch.zeros(24, 16)
    metadata = {f"{name}.weight": json.dumps(own.said) for name, own in modules.items()}
    metadata["lm_head.weight"] = json.dumps({"_type": "Tensor"})
    return QuantSample(
        config=config,
        tensors=tensors,
        linears=tuple(linear(name, *own.values.shape) for name, own in modules.items()),
        oracle={name: torch.from_numpy(own.values) for name, own in modules.items()},
        plain=(linear("lm_head", 24, 16, "head.weight"), linear("model.layers.9.self_attn.q_proj", 8, 16)),
        metadata={**metadata, "tensor_names": json.dumps(list(metadata))},
        **more,
    )
