"""Checkpoints in bitsandbytes' format, written element by element from its description, and the values they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kvpage.api.quant import LinearSpec
from kvpage.testing.checkpoints import QuantSample, linear

TABLES = {
    "nf4": [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803,
        0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ],
    "fp4": [
        0.0, 0.005208333, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25, 0.0, -0.005208333, -0.6666667, -1.0,
        -0.33333334, -0.5, -0.16666667, -0.25,
    ],
}  # fmt: skip
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
Stored = tuple[dict[str, torch.Tensor], np.ndarray]


def four_bit(
    outputs: int,
    inputs: int,
    kind: str,
    *,
    blocksize: int = 64,
    nested: int = 0,
    storage: torch.dtype = torch.uint8,
) -> Stored:
    """(the tensors of a random weight by suffix, its float32 values [out, in])."""
    generator = np.random.default_rng([outputs, inputs, blocksize, nested])
    count = outputs * inputs
    codes = generator.integers(0, 16, count)
    table = np.array(TABLES[kind], np.float32)
    blocks = -(-count // blocksize)
    said: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": blocksize,
        "dtype": "bfloat16",
        "shape": [outputs, inputs],
    }
    parts: dict[str, np.ndarray] = {"quant_map": table}
    if nested:
        parts["absmax"] = generator.integers(0, 256, blocks, dtype=np.uint8)
        parts["nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
        parts["nested_absmax"] = generator.random(-(-blocks // nested), np.float32) * np.float32(0.01)
        said |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.02}
        shared = parts["nested_absmax"][np.arange(blocks) // nested]
        scales = parts["nested_quant_map"][parts["absmax"]] * shared + np.float32(0.02)
    else:
        scales = parts["absmax"] = generator.random(blocks, np.float32)
    packed = np.zeros(-(-count // 2) + 8, np.uint8)
    for at, code in enumerate(codes):
        packed[at // 2] |= code << (0 if at % 2 else 4)
    stored = -(-count // (2 * storage.itemsize)) * storage.itemsize
    tensors = {f"weight.{name}": torch.from_numpy(values.copy()) for name, values in parts.items()}
    tensors["weight"] = torch.from_numpy(packed[:stored].copy()).view(storage).unsqueeze(1)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = state_of(said)
    values = table[codes] * scales[np.arange(count) // blocksize]
    return tensors, values.reshape(outputs, inputs)


def int8(outputs: int, inputs: int) -> Stored:
    generator = np.random.default_rng([outputs, inputs])
    codes = generator.integers(-127, 128, (outputs, inputs), dtype=np.int8)
    scales = generator.random(outputs, np.float32)
    tensors = {
        "weight": torch.from_numpy(codes),
        "SCB": torch.from_numpy(scales),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes * scales[:, None] * np.float32(7.874015718698502e-3)


def state_of(said: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def sample(stored: Mapping[str, Stored], config: Mapping[str, Any], **more: Any) -> QuantSample:
    """A checkpoint of those modules, with a plain lm_head."""
    specs = [spec_of(name, values) for name, (_, values) in stored.items()]
    tensors = {
        f"{name}.{suffix}": tensor for name, (own, _) in stored.items() for suffix, tensor in own.items()
    }
    tensors["lm_head.weight"] = torch.zeros(24, 16)
    return QuantSample(
        config=config,
        tensors=tensors,
        linears=tuple(specs),
        oracle={name: torch.from_numpy(values) for name, (_, values) in stored.items()},
        plain=(linear("lm_head", 24, 16, "head.weight"), linear("model.layers.9.self_attn.q_proj", 8, 16)),
        **more,
    )


def spec_of(name: str, values: np.ndarray) -> LinearSpec:
    return linear(name, *values.shape)
