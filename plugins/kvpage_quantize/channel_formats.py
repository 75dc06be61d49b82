"""int8 and fp8 as compressed-tensors stores them: a scale an output, activations scaled a token at a time by the engine.

Straight from the files: a tensor is read in slices, so that memory holds one quantized tensor and no more.
Format: compressed-tensors 0.19, "int-quantized" and "float-quantized" (https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvpage import CheckpointError
from kvpage.api.quant import CheckpointView, TensorInfo
from kvpage_quantize.report import LayerError, SquaredError
from kvpage_quantize.safetensors_files import Piece
from kvpage_quantize.source import Source

FORMAT_VERSION = "0.19.0"
"""Of compressed-tensors, whose keys ``config`` has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelFormat:
    """How a number is stored.

    Attributes:
        name: of the format. kind: of its numbers, for the config. dtype: theirs.
        steps: of the largest weight of an output, which its scale is divided by.
        lowest, highest: of a code.
    """

    name: str
    kind: str
    dtype: torch.dtype
    steps: float
    lowest: float
    highest: float

    def codes(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """weight [n, in] and scale [n, 1], both float32 -> [n, in] of ``dtype``."""
        scaled = weight / scale
        if not self.dtype.is_floating_point:
            scaled = scaled.round()
        return scaled.clamp_(self.lowest, self.highest).to(self.dtype)

    def scale(self, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """largest [n, 1] float32, the absolute maximum of each output -> its scale, in ``dtype``; never zero."""
        scale = (largest / self.steps).to(dtype)
        return scale.masked_fill_(scale == 0, torch.finfo(dtype).tiny)


INT8 = ChannelFormat(
    name="int-quantized", kind="int", dtype=torch.int8, steps=127.5, lowest=-128, highest=127
)
FP8 = ChannelFormat(
    name="float-quantized", kind="float", dtype=torch.float8_e4m3fn, steps=448, lowest=-448, highest=448
)


def channel_pieces(source: Source, chosen: ChannelFormat, errors: list[LayerError]) -> Iterator[Piece]:
    """Every tensor of the checkpoint, its linear weights quantized; ``errors`` grows as they are made."""
    linear = set(source.linear_tensors())
    for name in source.view.names():
        if name in linear:
            yield _quantized(source.view, name, chosen, errors)
        else:
            yield _plain(source.view, name)


def channel_config(source: Source, chosen: ChannelFormat) -> dict[str, Any]:
    """``quantization_config``, with every key that compressed-tensors writes."""
    arguments: dict[str, Any] = {
        "actorder": None, "block_structure": None, "group_size": None, "num_bits": 8, "observer_kwargs": {},
        "scale_dtype": None, "symmetric": True, "type": chosen.kind, "zp_dtype": None,
    }  # fmt: skip
    weights = {**arguments, "dynamic": False, "observer": "memoryless_minmax", "strategy": "channel"}
    activations = {**arguments, "dynamic": True, "observer": None, "strategy": "token"}
    group = {
        "format": chosen.name,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": chosen.name,
        "global_compression_ratio": None,
        "ignore": _left_plain(source),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": FORMAT_VERSION,
    }


def _left_plain(source: Source) -> list[str]:
    """Modules that a reader must not expect to be quantized: the head, routers, whatever is not of the decoder."""
    packed = {*source.linear_tensors(), *source.tables()}
    plain = {
        name.removesuffix(".weight")
        for name in source.view.names()
        if name.endswith(".weight") and name not in packed and len(source.view.info(name).shape) == 2
    }
    return sorted({"lm_head", *plain})


def _plain(view: CheckpointView, name: str) -> Piece:
    return Piece(infos={name: view.info(name)}, make=lambda: {name: view.read(name)})


def _quantized(view: CheckpointView, name: str, chosen: ChannelFormat, errors: list[LayerError]) -> Piece:
    info = view.info(name)
    dtype = str(chosen.dtype).removeprefix("torch.")
    infos = {
        name: TensorInfo(shape=info.shape, dtype=dtype),
        f"{name}_scale": TensorInfo(shape=(info.shape[0], 1), dtype=info.dtype),
    }

    def make() -> Mapping[str, torch.Tensor]:
        codes = torch.empty(info.shape, dtype=chosen.dtype, device="cpu")
        scales = torch.empty((info.shape[0], 1), dtype=getattr(torch, info.dtype), device="cpu")
        error = SquaredError()
        row = 0
        for stored in view.slices(name, 0, info.shape[0]):
            weight = stored.float()
            largest = _largest(view, name, weight)
            rows = slice(row, row := row + weight.shape[0])
            scales[rows] = chosen.scale(largest, scales.dtype)
            codes[rows] = chosen.codes(weight, scales[rows].float())
            kept = codes[rows].float() * scales[rows].float()
            error.add((kept - weight).square().sum().item(), weight.square().sum().item())
        errors.append(LayerError(name=name.removesuffix(".weight"), weight=error.relative))
        return {name: codes, f"{name}_scale": scales}

    return Piece(infos=infos, make=make)


def _largest(view: CheckpointView, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The absolute maximum of each output, [n, 1].

    Raises:
        CheckpointError: a weight is no number.
    """
    largest = weight.abs().amax(dim=1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise CheckpointError(
            f"{view.where(name)}: tensor {name!r} holds weights that are infinite or not a number; the checkpoint is "
            "damaged, download it again"
        )
    return largest


FORMATS: Mapping[str, ChannelFormat] = {"int8": INT8, "fp8": FP8}
