"""What gptq and awq hand over, and the checkpoint it makes: the source's tensors by the source's names, some replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kvpage import CheckpointError, KvpageError
from kvpage.api.quant import TensorInfo
from kvpage_quantize.report import LayerError
from kvpage_quantize.safetensors_files import Piece, piece_of
from kvpage_quantize.source import FLOATS, Source

PLAIN_DTYPE = "float16"
"""Of what stays plain: the tools of both formats write it, and the older kernels compute in nothing else."""


@dataclass(kw_only=True, slots=True)
class Packed:
    """The outcome of a method.

    Attributes:
        config: ``quantization_config``.
        modules: linear module -> its new tensors by suffix ("qweight"), in place of its weight.
        changed: plain tensors that the method changed (norms that AWQ folds scales into).
    """

    config: dict[str, Any]
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: list[LayerError] = field(default_factory=list)


def packed_pieces(source: Source, packed: Packed) -> Iterator[Piece]:
    """Every tensor of the new checkpoint.

    Raises:
        CheckpointError: transformers names a module otherwise than the files do.
    """
    names = set(source.view.names())
    for module in packed.modules:
        if f"{module}.weight" not in names:
            raise CheckpointError(
                f"{source.folder}: transformers has a module {module!r}, but the files have no tensor '{module}.weight'; "
                "quantize it with --method int8 or fp8"
            )
    for name in source.view.names():
        module, _, suffix = name.rpartition(".")
        tensors = packed.modules.get(module, {})
        if suffix == "weight" and tensors:
            yield piece_of({f"{module}.{key}": tensor for key, tensor in tensors.items()})
        elif suffix not in tensors:
            yield _plain(source, name, packed.changed)


def _plain(source: Source, name: str, changed: Mapping[str, torch.Tensor]) -> Piece:
    info = source.view.info(name)
    if info.dtype not in FLOATS:
        return Piece(infos={name: info}, make=lambda: {name: source.view.read(name)})

    def make() -> Mapping[str, torch.Tensor]:
        tensor = changed[name] if name in changed else source.view.read(name)
        kept = tensor.to(getattr(torch, PLAIN_DTYPE))
        if not bool(kept.isfinite().all()):
            raise KvpageError(
                f"{source.view.where(name)}: tensor {name!r} holds values beyond what {PLAIN_DTYPE} can, which these "
                "formats store plain weights in; quantize it with --method int8 or fp8"
            )
        return {name: kept}

    return Piece(infos={name: TensorInfo(shape=info.shape, dtype=PLAIN_DTYPE)}, make=make)
