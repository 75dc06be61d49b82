"""Decoder backends, a checkpoint reader, a linear kernel and a policy, as plugins of these tests register them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from kvpage import hookimpl
from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.decoder import Reasons
from kvpage.api.quant import WeightForm
from kvpage.api.records import (
    CheckpointReaderRecord,
    DecoderBackendRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    Record,
    SchedulingPolicyRecord,
)
from kvpage.loading.readers import SafetensorsView
from kvpage.loading.safetensors import SafetensorsFile
from kvpage.models.decoder import TorchDecoder
from kvpage.nn.linear import DenseLinear

SELF = "parts_of_plugins"
SUFFIX = ".packed"


class Plugin:
    """Registers the records that it is given."""

    def __init__(self, *records: Record) -> None:
        for name, kind in HOOKS.items():
            setattr(self, name, _implementation([r for r in records if isinstance(r, kind)]))


HOOKS = {
    "kvpage_decoder_backends": DecoderBackendRecord,
    "kvpage_checkpoint_readers": CheckpointReaderRecord,
    "kvpage_linear_kernels": LinearKernelRecord,
    "kvpage_logits_processors": LogitsProcessorRecord,
    "kvpage_scheduling_policies": SchedulingPolicyRecord,
}


def _implementation(records: list[Record]) -> Any:
    @hookimpl
    def registers() -> list[Record]:
        return records

    return registers


class Counting(TorchDecoder):
    """The torch decoder, which says that it was asked."""

    built: ClassVar[list[str]] = []

    def build(self, spec: Any, weights: Mapping[str, WeightForm], env: Any) -> Any:
        self.built.append(spec.family)
        return super().build(spec, weights, env)


class Declining(TorchDecoder):
    def build(self, spec: Any, weights: Mapping[str, WeightForm], env: Any) -> Any:
        return Reasons(("the weights lie the wrong way round",))


class Refusing(TorchDecoder):
    @classmethod
    def refuses(cls, spec: Any, env: Any) -> list[str]:
        return [f"{len(spec.layers)} layers are too many"]


class Packed(CheckpointReader):
    """A checkpoint in one file of its own: a JSON line with config and tokenizer, and safetensors beside it."""

    def config(self) -> Mapping[str, Any]:
        found: dict[str, Any] = self._header()["config"]
        return found

    def weights(self) -> Any:
        return SafetensorsView([SafetensorsFile(self._file().with_suffix(".tensors"))])

    def tokenizer(self) -> str | None:
        return str(self._header()["tokenizer"])

    def _header(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file().read_text(encoding="utf-8"))
        return found

    def _file(self) -> Path:
        return self.path if self.path.is_file() else next(self.path.glob("*" + SUFFIX))


def pack(checkpoint: Path, folder: Path) -> Path:
    """``checkpoint`` in the format of ``Packed``; the file."""
    folder.mkdir()
    (folder / "model.tensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    header = {
        "config": json.loads((checkpoint / "config.json").read_text(encoding="utf-8")),
        "tokenizer": (checkpoint / "tokenizer.json").read_text(encoding="utf-8"),
    }
    (folder / f"model{SUFFIX}").write_text(json.dumps(header), encoding="utf-8")
    return folder / f"model{SUFFIX}"


class Doubling(CheckpointReader):
    """Raises what a careless reader raises."""

    def config(self) -> Mapping[str, Any]:
        raise KeyError("general.architecture")

    def weights(self) -> Any: ...


class CountingLinear(DenseLinear):
    """The plain kernel, which counts the rows it computes."""

    name = "counting"
    rows: ClassVar[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        return super().forward(x)


class UnmakablePolicy:
    def __init__(self) -> None:
        raise RuntimeError("boom in the constructor")
