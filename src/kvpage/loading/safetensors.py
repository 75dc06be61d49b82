"""Reading one .safetensors file: a checked header, and tensors that are views of the mapped file.

Format: 8 bytes little-endian header size, a JSON object, then the data. Nothing in the header is believed before
it is checked against the file's size. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvpage.api.quant import TensorInfo
from kvpage.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"


class SafetensorsFile:
    """One file. The header is read at once, the data mapped at the first ``read``.

    Raises:
        CheckpointError: the file is truncated, or its header does not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: mmap.mmap | None = None
        self._start, self._entries, self.metadata = _read_header(path)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype."""
        return {name: info for name, (info, _) in self._entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a view of the file; not to be written."""
        info, begin = self._entries[name]
        dtype: torch.dtype = getattr(torch, info.dtype)
        count = math.prod(info.shape)
        if count == 0:
            return torch.empty(info.shape, dtype=dtype, device="cpu")
        offset = self._start + begin
        if offset % dtype.itemsize:
            raw = torch.frombuffer(
                self._mapped(), dtype=torch.uint8, count=count * dtype.itemsize, offset=offset
            )
            return raw.clone().view(dtype).view(info.shape)
        return torch.frombuffer(self._mapped(), dtype=dtype, count=count, offset=offset).view(info.shape)

    def release(self, name: str, begin: int, end: int) -> None:
        """Bytes [begin, end) of ``name`` were used: their pages leave this process (the file cache keeps them)."""
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is None or self._data is None:
            return
        offset = self._start + self._entries[name][1]
        first = (offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.madvise(advice, first, offset + end - first)

    def _mapped(self) -> mmap.mmap:
        if self._data is None:
            with self.path.open("rb") as file:
                # Private and writable, never written: torch warns about views of read-only memory.
                if sys.platform == "win32":
                    self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                else:
                    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                    protection = mmap.PROT_READ | mmap.PROT_WRITE
                    self._data = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
        return self._data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice would hide a tensor."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.80} comes twice")
    return found


def _read_header(path: Path) -> tuple[int, dict[str, tuple[TensorInfo, int]], Mapping[str, str]]:
    """(offset of the data, name -> (info, offset within the data), what else it says), all checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
            if head == LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' there"
                )
            file.seek(8)
            length = int.from_bytes(head[:8], "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its header should have {length} bytes, the file has "
                    f"{size} in all; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not valid JSON ({error}); download the file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, found a {type(header).__name__}")
    start = 8 + length
    entries: dict[str, tuple[TensorInfo, int]] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, begin, end = _read_entry(path, name, entry)
        if end > size - start:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {start + end}, the file has {size}; "
                "download it again"
            )
        entries[name] = (info, begin)
        spans.append((begin, end, name))
    _refuse_overlap(path, spans)
    stated = header.get("__metadata__") or {}
    metadata = {str(key): str(value) for key, value in stated.items()} if isinstance(stated, dict) else {}
    return start, entries, metadata


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} needs dtype, shape and data_offsets, found {entry!r:.80}"
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r:.40}; kvpage reads {', '.join(DTYPES)}"
        )
    sizes = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in sizes):
        raise CheckpointError(
            f"{path}: tensor {name!r} has a shape or offsets that are no sizes: {entry!r:.80}"
        )
    info = TensorInfo(shape=tuple(shape), dtype=DTYPES[dtype])
    item: torch.dtype = getattr(torch, info.dtype)
    expected = math.prod(shape) * item.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} and {dtype} takes {expected} bytes, "
            f"the header gives it {end - begin}"
        )
    return info, begin, end


def _refuse_overlap(path: Path, spans: list[tuple[int, int, str]]) -> None:
    spans.sort()
    for (_, end, before), (begin, _, name) in pairwise(spans):
        if begin < end:
            raise CheckpointError(f"{path}: tensors {before!r} and {name!r} overlap; the file is damaged")
