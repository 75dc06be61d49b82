"""Checkpoint views: a folder of safetensors, a transformers model in memory, or values made up."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.model import ModelDefinition, WeightRef
from kvpage.api.parameters import parameters
from kvpage.api.quant import CheckpointView, TensorInfo
from kvpage.errors import CheckpointError
from kvpage.loading.safetensors import SafetensorsFile

SLICE_BYTES = 4 * 2**20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
"""auto-gptq names its files by the format ("gptq_model-4bit-128g")."""
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


class SafetensorsReader(CheckpointReader):
    """A folder in Hugging Face layout, or one safetensors file of such a folder."""

    def weights(self) -> CheckpointView:
        if self.path.is_file():
            return SafetensorsView([SafetensorsFile(self.path)])
        return open_checkpoint(self.path)


def open_checkpoint(path: Path) -> CheckpointView:
    """The safetensors in folder ``path``: one file, or the shards that an index names.

    Raises:
        CheckpointError: no such folder or no safetensors in it, a shard missing, a file damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder of a checkpoint")
    if (path / SINGLE_FILE).is_file():
        return SafetensorsView([SafetensorsFile(path / SINGLE_FILE)])
    indexes = [path / INDEX_FILE] if (path / INDEX_FILE).is_file() else sorted(path.glob(f"*{INDEX_ENDING}"))
    if len(indexes) == 1:
        return _open_shards(indexes[0])
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return SafetensorsView([SafetensorsFile(found[0])])
    if found:
        names = ", ".join(file.name for file in found[:4])
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files ({names} ...) but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "download the index too"
        )
    others = sorted(file.name for pattern in OTHER_FORMATS for file in path.glob(pattern))
    if others:
        if others[0].endswith(".gguf"):
            raise CheckpointError(
                f"{path} has weights as {', '.join(others[:4])}; name one of these files itself"
            )
        raise CheckpointError(
            f"{path} has weights as {others[0]} only; kvpage reads safetensors. Convert them once: "
            f"transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        )
    raise CheckpointError(
        f"{path} has no weights; {SINGLE_FILE}, or {INDEX_FILE} and its shards, are expected"
    )


def _open_shards(index: Path) -> CheckpointView:
    path = index.parent
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index (an object with weight_map): {error!r}; download it again"
        ) from error
    files = {}
    for name in sorted(set(wanted.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}; shards lie beside the index")
        if not (path / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing; download it")
        files[name] = SafetensorsFile(path / name)
    for name, file in wanted.items():
        if name not in files[file].infos():
            raise CheckpointError(
                f"{index} says that {file} holds tensor {name!r}; it does not. Download both again"
            )
    return SafetensorsView(list(files.values()))


class SafetensorsView:
    """Tensors of one or more files, read through their mappings; used pages are released slice by slice."""

    shared = False

    def __init__(self, files: Collection[SafetensorsFile]) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata.update(file.metadata)
            for name, info in file.infos().items():
                self._files[name], self._infos[name] = file, info

    def names(self) -> Collection[str]:
        return self._infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].read(name)

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        file, tensor = self._files[name], _as_rows(self.read(name))
        row_bytes = tensor[:1].numel() * tensor.element_size()
        for begin, end in _steps(start, stop, row_bytes):
            yield tensor[begin:end]
            file.release(name, begin * row_bytes, end * row_bytes)

    def release(self, name: str) -> None:
        """``name`` was used: its pages leave this process."""
        info = self._infos[name]
        dtype: torch.dtype = getattr(torch, info.dtype)
        self._files[name].release(name, 0, math.prod(info.shape) * dtype.itemsize)

    def where(self, name: str) -> str:
        return (
            str(self._files[name].path)
            if name in self._files
            else ", ".join(sorted({str(file.path) for file in self._files.values()}))
        )


class StatefulModel(Protocol):
    """What ``ModuleView`` needs of a model: ``torch.nn.Module.state_dict``."""

    def state_dict(self) -> Mapping[str, torch.Tensor]: ...


class ModuleView:
    """The parameters of a loaded transformers model, shared with it."""

    shared = True

    def __init__(self, model: StatefulModel) -> None:
        self._tensors = dict(model.state_dict())
        self._source = type(model).__name__

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        yield _as_rows(self._tensors[name])[start:stop]

    def where(self, name: str) -> str:
        return f"the given {self._source}"


class DummyView:
    """Random weights of a definition's shapes (``load_format="dummy"``): the same at every load.

    Norms are 1; all else is uniform with a standard deviation of 0.02, from a generator of its own.
    """

    shared = False

    def __init__(self, definition: ModelDefinition) -> None:
        self._infos: dict[str, TensorInfo] = {}
        self._ones: set[str] = set()
        for parameter in parameters(definition.spec):
            ref = definition.weights[parameter.name]
            shape = _stored_shape(ref, parameter.shape)
            known = self._infos.get(ref.name)
            if known is None or math.prod(known.shape) < math.prod(shape):
                self._infos[ref.name] = TensorInfo(shape=shape, dtype="float32")
            if parameter.kind == "norm":
                self._ones.add(ref.name)

    def names(self) -> Collection[str]:
        return self._infos.keys()

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        rows = _rows_shape(self._infos[name].shape)[0]
        return torch.cat(list(self.slices(name, 0, rows))).view(self._infos[name].shape)

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        _, *rest = _rows_shape(self._infos[name].shape)
        generator = torch.Generator(device="cpu")
        generator.manual_seed(zlib.crc32(f"{name}:{start}".encode()))
        for begin, end in _steps(start, stop, math.prod(rest) * 4):
            piece = torch.empty((end - begin, *rest), dtype=torch.float32, device="cpu")
            bound = 0.02 * math.sqrt(3)
            yield (
                piece.fill_(1.0) if name in self._ones else piece.uniform_(-bound, bound, generator=generator)
            )

    def where(self, name: str) -> str:
        return "dummy weights"


def _stored_shape(ref: WeightRef, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Least shape of the checkpoint's tensor that holds a parameter of ``shape`` at ``ref``."""
    rows = shape[0]
    if ref.rows is not None:
        start, stop = ref.rows
        rows = stop if ref.every is None else shape[0] // (stop - start) * ref.every
    stored = (rows, *shape[1:])
    entry = stored[::-1] if ref.transpose else stored
    return entry if ref.index is None else (ref.index + 1, *entry)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(_rows_shape(tuple(tensor.shape)))


def _rows_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with all dimensions but the last made one."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape or (1,)


def _steps(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in steps of at most SLICE_BYTES (and at least one row)."""
    step = max(1, SLICE_BYTES // max(row_bytes, 1))
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
