"""Writing safetensors: a few tensors at a time, in as many files as the hub's tools make of a model this large.

Format: 8 bytes little-endian header size, a JSON object, then the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvpage import KvpageError
from kvpage.api.quant import TensorInfo

SHARD_BYTES = 5_000_000_000
ALIGNMENT = 8
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float64": "F64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tensors that are made together: their names, shapes and dtypes now, their numbers when ``make`` is called.

    ``make`` is called once; what it gives must be what ``infos`` says.
    """

    infos: Mapping[str, TensorInfo]
    make: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(info) for info in self.infos.values())


def piece_of(tensors: Mapping[str, torch.Tensor]) -> Piece:
    """Tensors that are there already."""
    infos = {
        name: TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }
    return Piece(infos=infos, make=lambda: tensors)


def write_safetensors(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    shard_bytes: int = SHARD_BYTES,
    written: Callable[[Piece], None] = lambda piece: None,
) -> int:
    """Write ``pieces`` to ``folder``: model.safetensors, or several files and their index. Bytes of all tensors.

    Args:
        shard_bytes: a file holds no more, unless a single piece does.
        written: called after each piece.

    Raises:
        KvpageError: the disk does not take it.
    """
    shards = _shards(list(pieces), shard_bytes)
    total = sum(piece.nbytes for shard in shards for piece in shard)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        try:
            _write_file(folder / name, shard, written)
        except OSError as error:
            raise KvpageError(
                f"{folder / name} cannot be written ({error.strerror}): the checkpoint takes {total / 1e9:.2f} GB"
            ) from error
        places.update({tensor: name for piece in shard for tensor in piece.infos})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return total


def _shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        if piece.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(piece)
        room -= piece.nbytes
    return shards


def _write_file(path: Path, pieces: Sequence[Piece], written: Callable[[Piece], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        for name, info in piece.infos.items():
            begin, end = end, end + _nbytes(info)
            header[name] = {
                "dtype": DTYPES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            tensors = piece.make()
            for name, info in piece.infos.items():
                tensor = tensors[name]
                stated = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                assert stated == (info.shape, info.dtype), f"{name} became {stated}, the header says {info}"
                if tensor.numel():
                    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    file.write(flat.numpy().data)
            written(piece)


def _nbytes(info: TensorInfo) -> int:
    dtype: torch.dtype = getattr(torch, info.dtype)
    return math.prod(info.shape) * dtype.itemsize
