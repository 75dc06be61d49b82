"""Checkpoints for the suites: tensors in memory or in a folder of safetensors, as a view."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvpage.api.quant import LinearSpec, TensorInfo

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantSample:
    """One checkpoint that a scheme is proven on.

    Attributes:
        config: its ``quantization_config``; empty for a scheme that quantizes plain weights.
        tensors: all of it, by name.
        linears: the matrices it holds for the scheme, as the loader would name them.
        oracle: module name -> the float32 values [out, in] that its tensors stand for, exactly.
        plain: matrices that it stores plain, which the scheme must leave alone.
        wrong_configs: variants of ``config`` that the scheme must refuse.
        metadata: what the file's header says beside its tensors.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    linears: tuple[LinearSpec, ...]
    oracle: Mapping[str, torch.Tensor] = field(default_factory=dict)
    plain: tuple[LinearSpec, ...] = ()
    wrong_configs: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def view(self, **changes: torch.Tensor | None) -> TensorsView:
        """Its tensors; ``changes`` by name replaces one, ``None`` leaves it out."""
        changed = {**self.tensors, **changes}
        return TensorsView(
            {name: tensor for name, tensor in changed.items() if tensor is not None}, self.metadata
        )


class TensorsView:
    """A ``kvpage.api.quant.CheckpointView`` of tensors in memory."""

    shared = False

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._tensors = dict(tensors)
        self.metadata: Mapping[str, str] = metadata or {}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        tensor = self._tensors[name]
        yield (tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(-1))[start:stop]

    def where(self, name: str) -> str:
        return "the sample"


def linear(name: str, out_features: int, in_features: int, parameter: str | None = None) -> LinearSpec:
    """One matrix; ``parameter``: kvpage's name, by default that of an attention's q or of what the name says."""
    if parameter is None:
        last = name.rpartition(".")[2]
        parts = {"o_proj": "attention.out", "down_proj": "mlp.down", "gate_proj": "mlp.gate", "up_proj": "mlp.up",
                 "k_proj": "attention.k", "v_proj": "attention.v"}  # fmt: skip
        parameter = f"layers.0.{parts.get(last, 'attention.q')}.weight"
    return LinearSpec(name=name, parameters=(parameter,), in_features=in_features, out_features=out_features)


def read_folder(path: str | Path) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """(``quantization_config``, tensors) of a folder with a config.json and safetensors files.

    Raises:
        ValueError, OSError, KeyError: it is none.
    """
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        # 8 bytes little-endian length, then that much JSON, then the data.
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in entry["data_offsets"])
                flat = torch.tensor(data[first:last], dtype=torch.uint8, device="cpu")
                tensors[name] = flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return config, tensors


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """``path``/config.json, and ``path``/model.safetensors where there are tensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    if not tensors:
        return
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
