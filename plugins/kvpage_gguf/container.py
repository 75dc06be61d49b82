"""The GGUF container: a checked header of keys and tensors, and the mapped file. Nothing is believed before it is bounded.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvpage import CheckpointError
from kvpage_gguf.architectures import BLOCK_TYPES, OTHER_TYPES, PLAIN_TYPES

MAGIC = b"GGUF"
LFS_POINTER = b"version https://git-lfs"
VERSIONS = (2, 3)
MAX_KEYS, MAX_TENSORS, MAX_DIMS = 2**16, 2**18, 4
MAX_NAME, MAX_TEXT, MAX_ARRAY = 2**16 - 1, 2**24, 2**23
LEAST_KEY, LEAST_TENSOR = 13, 33
"""Bytes that a key and its value, and the description of a tensor, take at least."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header describes it.

    Attributes:
        type: ggml's name ("Q4_K"). dtype: torch's, "uint8" of blocks. block: weights in a block, 0 = plain.
        shape: outputs first; the last dimension counts weights. row_bytes: of one row of that.
        start: first byte in the file.
    """

    name: str
    type: str
    dtype: str
    block: int
    shape: tuple[int, ...]
    row_bytes: int
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class _Array:
    """Where an array's elements begin; they are read when they are asked for."""

    type: int
    count: int
    start: int


class GGUFFile:
    """One file: its keys by name, and its tensors.

    Raises:
        CheckpointError: it is no GGUF of a known version, is truncated or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _mapped(path)
        self._at = 0
        tensors, keys = self._counts()
        self._values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string("a key's name", MAX_NAME)
            if key in self._values:
                raise self.error(f"the key {key!r:.80} comes twice; {AGAIN}")
            self._values[key] = self._value(key)
        self._refuse_parts()
        described = [self._description(index) for index in range(tensors)]
        self._start = -(-self._at // self._alignment) * self._alignment
        self.tensors: Mapping[str, StoredTensor] = {t.name: t for t in map(self._placed, described)}
        if len(self.tensors) < tensors:
            names = [name for name, *_ in described]
            twice = next(name for name in self.tensors if names.count(name) > 1)
            raise self.error(f"the tensor {twice!r:.80} is described twice; {AGAIN}")
        self._refuse_overlap()

    def error(self, message: str) -> CheckpointError:
        """One that names the file."""
        return CheckpointError(f"{self.path}: {message}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """The value of ``key``: an int, a float (finite; an int is one too), a bool or a str.

        Raises:
            CheckpointError: it is of another type.
        """
        value = self._values.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            found = f"an array of {value.count}" if isinstance(value, _Array) else repr(value)
            raise self.error(f"key {key!r} must be one finite {kind.__name__}, found {found:.80}")
        return value

    def require(self, key: str, kind: type[Any]) -> Any:
        """``get``, of a key that must be there."""
        if key not in self._values:
            raise self.error(
                f"key {key!r} is missing (expected: {kind.__name__}); {AGAIN}, or convert it anew"
            )
        return self.get(key, kind)

    def is_array(self, key: str) -> bool:
        return isinstance(self._values.get(key), _Array)

    def array(self, key: str, kind: type[Any]) -> list[Any]:
        """The elements of an array of strings, or of numbers (int, float or bool), empty where there is no such key.

        Raises:
            CheckpointError: it is no array, or one of another type.
        """
        found = self._values.get(key)
        if found is None:
            return []
        if not isinstance(found, _Array):
            raise self.error(f"key {key!r} must be an array, found {found!r:.80}")
        if found.type == STRING:
            elements: list[Any] = list(self._strings(key, found))
        else:
            elements = list(
                struct.unpack_from(f"<{found.count}{SCALARS[found.type]}", self.data, found.start)
            )
        if elements and type(elements[0]) is not kind:
            raise self.error(
                f"key {key!r} must be an array of {kind.__name__}, found {type(elements[0]).__name__}"
            )
        return elements

    def _counts(self) -> tuple[int, int]:
        """(tensors, keys) that the header announces."""
        head = bytes(self.data[: len(LFS_POINTER)])
        if head == LFS_POINTER:
            raise self.error("this is a Git LFS pointer, not the file itself: run 'git lfs pull' there")
        if head[:4] != MAGIC:
            raise self.error(f"no GGUF file: it begins with {head[:4]!r}, expected {MAGIC!r}")
        self._at = 4
        version = self._scalar("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "the file is big-endian" if swapped in (1, *VERSIONS) else f"GGUF version {version}"
            raise self.error(f"{why}; kvpage reads little-endian GGUF of version 2 and 3: convert it anew")
        tensors, keys = self._scalar("Q", "the number of tensors"), self._scalar("Q", "the number of keys")
        left = len(self.data) - self._at
        for what, count, most, least in (
            ("keys", keys, MAX_KEYS, LEAST_KEY),
            ("tensors", tensors, MAX_TENSORS, LEAST_TENSOR),
        ):
            if count > min(most, left // least):
                raise self.error(
                    f"the header announces {count} {what}; the {left} bytes after it hold at most "
                    f"{min(most, left // least)}: the file is truncated or damaged, {AGAIN}"
                )
        return tensors, keys

    def _refuse_parts(self) -> None:
        parts = self.get("split.count", int, 0)
        if parts > 1:
            raise self.error(
                f"this is one of {parts} parts of a model (split.count); join them first: "
                f"llama-gguf-split --merge {self.path.name} whole.gguf"
            )

    @property
    def _alignment(self) -> int:
        found: int = self.get("general.alignment", int, 32)
        if not 1 <= found <= 2**20 or found & (found - 1):
            raise self.error(f"key 'general.alignment' must be a power of two up to {2**20}, found {found}")
        return found

    def _take(self, count: int, what: str) -> int:
        """Where the next ``count`` bytes are."""
        start = self._at
        if count > len(self.data) - start:
            raise self.error(
                f"{what} takes {count} bytes from byte {start} on, the file has {len(self.data)}: it is truncated "
                f"or damaged, {AGAIN}"
            )
        self._at = start + count
        return start

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self._take(struct.calcsize(f"<{code}"), what))[0]

    def _string(self, what: str, most: int) -> str:
        length = self._scalar("Q", f"the length of {what}")
        if length > most:
            raise self.error(
                f"{what} has {length} bytes, at most {most} are read: the file is damaged, {AGAIN}"
            )
        start = self._take(length, what)
        return self._text(what, start, length)

    def _text(self, what: str, start: int, length: int) -> str:
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is no UTF-8 text ({error.reason} at byte {start}); {AGAIN}") from error

    def _value(self, key: str) -> Any:
        """The value at the cursor; of an array, its place."""
        kind = self._scalar("I", f"the type of key {key!r:.80}")
        what = f"the value of key {key!r:.80}"
        if kind == STRING:
            return self._string(what, MAX_TEXT)
        if kind == ARRAY:
            return self._array(key, what)
        value = self._scalar(self._code(kind, key), what)
        return _shortest(value) if kind == FLOAT32 else value

    def _code(self, kind: int, key: str) -> str:
        if kind not in SCALARS:
            raise self.error(
                f"key {key!r:.80} has a value of type {kind}, which GGUF does not define; {AGAIN}"
            )
        return SCALARS[kind]

    def _array(self, key: str, what: str) -> _Array:
        kind, count = self._scalar("I", f"the type of {what}"), self._scalar("Q", f"the length of {what}")
        if kind == ARRAY:
            raise self.error(f"key {key!r:.80} is an array of arrays, which kvpage does not read")
        if count > MAX_ARRAY:
            raise self.error(f"{what} has {count} elements, at most {MAX_ARRAY} are read; {AGAIN}")
        found = _Array(kind, count, self._at)
        if kind != STRING:
            self._take(count * struct.calcsize(f"<{self._code(kind, key)}"), what)
            return found
        for _ in range(count):
            length = int.from_bytes(self.data[self._at : self._at + 8], "little")
            self._take(8, what)
            self._take(length, what)
        return found

    def _strings(self, key: str, array: _Array) -> Iterator[str]:
        at = array.start
        for index in range(array.count):
            length = int.from_bytes(self.data[at : at + 8], "little")
            if length > MAX_NAME:
                raise self.error(
                    f"key {key!r}: element {index} has {length} bytes, at most {MAX_NAME} are read"
                )
            yield self._text(f"key {key!r}: element {index}", at + 8, length)
            at += 8 + length

    def _description(self, index: int) -> tuple[str, list[int], int, int]:
        """(name, dimensions as stored, type, offset) of the tensor at the cursor."""
        what = f"the description of tensor {index}"
        name = self._string(f"the name in {what}", MAX_NAME)
        count = self._scalar("I", what)
        if not 1 <= count <= MAX_DIMS:
            raise self.error(
                f"tensor {name!r:.80} has {count} dimensions, 1 to {MAX_DIMS} are known; {AGAIN}"
            )
        dims = [self._scalar("Q", what) for _ in range(count)]
        return name, dims, self._scalar("I", what), self._scalar("Q", what)

    def _placed(self, description: tuple[str, list[int], int, int]) -> StoredTensor:
        name, dims, kind, offset = description
        if min(dims) < 1:
            raise self.error(f"tensor {name!r:.80} has the dimensions {dims}; each is at least 1")
        if kind in PLAIN_TYPES:
            known, dtype, row = PLAIN_TYPES[kind]
            block, row_bytes = 0, dims[0] * row
        elif kind in BLOCK_TYPES:
            known, block, size = BLOCK_TYPES[kind]
            if dims[0] % block:
                raise self.error(
                    f"tensor {name!r:.80} is {known} with {dims[0]} inputs; blocks have {block}, which must divide them"
                )
            dtype, row_bytes = "uint8", dims[0] // block * size
        else:
            names = ", ".join(entry[0] for entry in (*PLAIN_TYPES.values(), *BLOCK_TYPES.values()))
            raise self.error(
                f"tensor {name!r:.80} has the type {OTHER_TYPES.get(kind, 'unknown')} ({kind}); kvpage reads {names}. "
                "Take a file of those (Q4_K_M, Q8_0), or make one with llama-quantize"
            )
        tensor = StoredTensor(name, known, dtype, block, tuple(dims[::-1]), row_bytes, self._start + offset)
        if offset % self._alignment:
            raise self.error(
                f"tensor {name!r:.80} begins at offset {offset}, no multiple of {self._alignment} (general.alignment)"
            )
        if tensor.start + tensor.nbytes > len(self.data):
            raise self.error(
                f"tensor {name!r:.80} of shape {list(tensor.shape)}, {known}, ends at byte "
                f"{tensor.start + tensor.nbytes}, the file has {len(self.data)}: it is truncated, {AGAIN}"
            )
        return tensor

    def _refuse_overlap(self) -> None:
        for first, second in pairwise(sorted(self.tensors.values(), key=lambda tensor: tensor.start)):
            if second.start < first.start + first.nbytes:
                raise self.error(f"tensors {first.name!r:.80} and {second.name!r:.80} overlap; {AGAIN}")


def _mapped(path: Path) -> mmap.mmap:
    """The file, private and writable (torch warns about views of read-only memory), never written."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise CheckpointError(f"{path} is empty; {AGAIN}")
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _shortest(value: float) -> float:
    """The decimal number that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    if not math.isfinite(value):
        return value
    found = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    stored = struct.pack("<f", value)
    return next((number for number in found if _as_float32(number) == stored), value)


def _as_float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # rounded up beyond the largest
        return b""
