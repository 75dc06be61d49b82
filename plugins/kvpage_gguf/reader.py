"""A .gguf file as a checkpoint: its config under Hugging Face's keys, its tensors by Hugging Face's names."""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvpage import CheckpointError
from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.quant import TensorInfo
from kvpage_gguf.architectures import (
    ARCHITECTURES,
    END_OF_TEXT,
    MIXTRAL,
    ROPE_TENSORS,
    SAMPLING,
    TOP,
    Architecture,
)
from kvpage_gguf.container import GGUFFile, StoredTensor
from kvpage_gguf.tokenizer import CONTROL, TOKEN_TYPES, TOKENS, tokenizer_config, tokenizer_json

if TYPE_CHECKING:
    import torch

    from kvpage.api.quant import CheckpointView

SLICE_BYTES = 4 * 2**20
MAX_EXPERTS = 10_000
FREQS, LONG, SHORT = ROPE_TENSORS
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the size whose scores are scaled by hidden size / heads, not by the size of a head."""
FULL_EVERY = {"gemma2": 2, "gemma3": 6}
"""Every n-th layer attends to all tokens, the others to a window."""


class GGUFReader(CheckpointReader):
    """One .gguf file, or a folder that holds exactly one."""

    def config(self) -> Mapping[str, Any]:
        return _Config(self._file).read()

    def weights(self) -> CheckpointView:
        return GGUFView(self._file)

    def tokenizer(self) -> str | None:
        return tokenizer_json(self._file)

    def tokenizer_config(self) -> Mapping[str, Any] | None:
        return tokenizer_config(self._file)

    def generation_config(self) -> Mapping[str, Any] | None:
        """Sampling defaults, and every token that ends a text: those stated, and known ones by name."""
        file = self._file
        ids = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
        typed = zip(file.array(TOKENS, str), file.array(TOKEN_TYPES, int), strict=False)
        ids += [
            index for index, (token, kind) in enumerate(typed) if kind == CONTROL and token in END_OF_TEXT
        ]
        found = {key: file.get(f"general.sampling.{name}", float) for name, key in SAMPLING.items()}
        return {
            "eos_token_id": list(dict.fromkeys(index for index in ids if index is not None)),
            **{key: value for key, value in found.items() if value is not None},
        }

    @functools.cached_property
    def _file(self) -> GGUFFile:
        path = self.path
        if path.is_dir():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                names = ", ".join(file.name for file in files[:4])
                raise CheckpointError(
                    f"{path} holds {len(files)} .gguf files ({names}): name the one that is the model"
                )
            path = files[0]
        return GGUFFile(path)


def architecture_of(file: GGUFFile) -> Architecture:
    """What general.architecture names.

    Raises:
        CheckpointError: one that kvpage does not read.
    """
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise file.error(
            f"general.architecture is {name!r:.80}; of GGUF kvpage reads {', '.join(ARCHITECTURES)}. Use the model's "
            "checkpoint in safetensors"
        )
    return MIXTRAL if name == "llama" and file.get("llama.expert_count", int, 0) else ARCHITECTURES[name]


class _Config:
    """The keys of one file as Hugging Face's."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._kind = file, architecture_of(file)
        self._prefix: str = file.require("general.architecture", str)

    def read(self) -> dict[str, Any]:
        kind, size = self._kind, self._size
        config: dict[str, Any] = {
            "architectures": [kind.name],
            "model_type": kind.model_type,
            "dtype": self._dtype(),
            "hidden_size": size("embedding_length"),
            "intermediate_size": size("feed_forward_length"),
            "num_hidden_layers": size("block_count"),
            "num_attention_heads": size("attention.head_count"),
            "max_position_embeddings": size("context_length"),
            "rms_norm_eps": self._file.require(f"{self._prefix}.attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._file.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._file.tensors,
            **kind.fixed,
        }
        config["num_key_value_heads"] = size("attention.head_count_kv", config["num_attention_heads"])
        config["vocab_size"] = self._vocab_size()
        config |= self._heads(config) | self._windows(config["num_hidden_layers"]) | self._rope(config)
        for key, name in kind.keys.items():
            value = self._get(key, float if key.endswith("softcapping") else int)
            if value is not None:
                config[name] = value
        for name in ("bos", "eos", "pad"):
            token = self._file.get(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id", int)
            if token is not None:
                config[f"{name}_token_id"] = token
        if any(tensor.block for tensor in self._file.tensors.values()):
            config["quantization_config"] = {"quant_method": "gguf"}
        return config

    def _get(self, key: str, of: type[Any], default: Any = None) -> Any:
        return self._file.get(f"{self._prefix}.{key}", of, default)

    def _size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, one for all layers."""
        name = f"{self._prefix}.{key}"
        if self._file.is_array(name):
            raise self._file.error(
                f"key {name!r} is an array, a value a layer; kvpage runs models of equal layers"
            )
        found: int = self._file.require(name, int) if default is None else self._file.get(name, int, default)
        if not 1 <= found < 2**31:
            raise self._file.error(f"key {name!r} must be 1 to {2**31 - 1}, found {found}")
        return found

    def _dtype(self) -> str:
        """float32 where everything is stored so; else bfloat16, which models are trained in and CPUs compute."""
        types = {tensor.type for tensor in self._file.tensors.values() if len(tensor.shape) > 1}
        return "float32" if types <= {"F32", "F64"} else "bfloat16"

    def _vocab_size(self) -> int:
        embedding = self._file.tensors.get("token_embd.weight")
        return self._size("vocab_size") if embedding is None else embedding.shape[0]

    def _heads(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Size of a head, the part of it that rope turns, and the scale of scores."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        found: dict[str, Any] = {}
        turned = self._get("rope.dimension_count", int)
        head = self._size("attention.key_length", max(hidden // heads, 1))
        values = self._size("attention.value_length", head)
        if values != head:
            raise self._file.error(
                f"{self._prefix}.attention.key_length is {head} and value_length {values}; they must be equal"
            )
        found["head_dim"] = head
        if turned is not None and turned != head:
            if not (self._kind.partial and 0 < turned < head):
                raise self._file.error(
                    f"key '{self._prefix}.rope.dimension_count' is {turned}; heads have {head} elements, and rope turns "
                    "all of them in this architecture"
                )
            found["partial_rotary_factor"] = turned / head
        if self._prefix in GEMMA_27B:
            largest = config["num_hidden_layers"] == GEMMA_27B[self._prefix]
            scale = self._get("attention.scale", float)
            size = hidden // heads if largest else head
            found["query_pre_attn_scalar"] = round(scale**-2) if scale else size
        return found

    def _windows(self, layers: int) -> dict[str, Any]:
        """The sliding window, and which layers have it."""
        window = self._get("attention.sliding_window", int)
        if self._kind is MIXTRAL or self._prefix not in ("phi3", *FULL_EVERY):
            return {}
        if self._prefix == "phi3":
            return {"sliding_window": window or None}
        if window is None:
            raise self._file.error(f"key '{self._prefix}.attention.sliding_window' is missing")
        pattern = f"{self._prefix}.attention.sliding_window_pattern"
        if self._file.is_array(pattern):
            slides = self._file.array(pattern, bool)
        else:
            every = self._get("attention.sliding_window_pattern", int, FULL_EVERY[self._prefix])
            slides = [every < 1 or (index + 1) % every != 0 for index in range(min(layers, 2**16))]
        types = ["sliding_attention" if slide else "full_attention" for slide in slides]
        return {"sliding_window": window, "layer_types": types}

    def _rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        context = config["max_position_embeddings"]
        found: dict[str, Any] = {"rope_theta": self._get("rope.freq_base", float, 10000.0)}
        if self._prefix == "gemma3":
            found["rope_local_base_freq"] = self._get("rope.freq_base_swa", float, 10000.0)
        trained = self._get("rope.scaling.original_context_length", int)
        kind = self._get("rope.scaling.type", str, "none")
        factor = self._get("rope.scaling.factor", float) or self._get("rope.scale_linear", float)
        scaling: dict[str, Any] = {}
        if LONG in self._file.tensors or SHORT in self._file.tensors:
            scaling = {
                "rope_type": "longrope",
                "short_factor": self._factors(SHORT),
                "long_factor": self._factors(LONG),
            }
            scaling["attention_factor"] = self._get("rope.scaling.attn_factor", float)
        elif FREQS in self._file.tensors:
            # Llama 3.1's scaling, worked out: each frequency is divided by a number of its own at any length.
            factors = self._factors(FREQS)
            scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
            scaling |= {"factor": 1.0, "attention_factor": 1.0}
            trained = context
        elif kind in ("linear", "yarn") or (kind == "none" and factor not in (None, 0.0, 1.0)):
            scaling = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
            if kind == "yarn":
                for key in ("beta_fast", "beta_slow"):
                    scaling[key] = self._get(f"rope.scaling.yarn_{key}", float)
        elif kind not in ("none", "longrope"):
            raise self._file.error(
                f"key '{self._prefix}.rope.scaling.type' is {kind!r:.40}; kvpage reads none, linear, yarn, longrope"
            )
        if trained:
            found["original_max_position_embeddings"] = trained
        if scaling:
            found["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
        return found

    def _factors(self, name: str) -> list[float]:
        tensor = self._file.tensors.get(name)
        if tensor is None or tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 2**16:
            found = "nothing" if tensor is None else f"{tensor.type} of shape {list(tensor.shape)}"
            raise self._file.error(f"tensor {name!r} must be F32 of one dimension, found {found}")
        factors = list(struct.unpack_from(f"<{tensor.shape[0]}f", self._file.data, tensor.start))
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise self._file.error(
                f"tensor {name!r} holds a factor that is not above 0; download the file again"
            )
        return factors


@dataclass(frozen=True, slots=True)
class _Entry:
    """One matrix by Hugging Face's name: a tensor or an expert of one.

    ``heads``: its rows are to be put back in order, head by head. ``shift``: is added to what is stored.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]
    start: int
    heads: int = 0
    shift: float = 0.0


class GGUFView:
    """The tensors of a file: plain ones as "MODULE.weight", blocks as "MODULE.q4_k", uint8 [outputs, bytes a row]."""

    shared = False

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._kind = file, architecture_of(file)
        self._entries: dict[str, _Entry] = {}
        for tensor in file.tensors.values():
            if tensor.name not in ROPE_TENSORS:
                self._entries.update(self._named(tensor))

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def info(self, name: str) -> TensorInfo:
        entry = self._entries[name]
        if entry.tensor.block:
            return TensorInfo(shape=(*entry.shape[:-1], entry.tensor.row_bytes), dtype="uint8")
        return TensorInfo(shape=entry.shape, dtype="float32" if entry.shift else entry.tensor.dtype)

    def read(self, name: str) -> torch.Tensor:
        entry, shape = self._entries[name], self.info(name).shape
        return self._rows(entry, 0, math.prod(shape[:-1]) if len(shape) > 1 else shape[0]).view(shape)

    def slices(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        entry = self._entries[name]
        size = _row_bytes(entry)
        step = max(1, SLICE_BYTES // size)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            yield self._rows(entry, begin, end)
            self._drop(entry.start + begin * size, entry.start + end * size)

    def release(self, name: str) -> None:
        """``name`` was used: its pages leave this process (the file cache keeps them)."""
        entry = self._entries[name]
        rows = math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else entry.shape[0]
        self._drop(entry.start, entry.start + rows * _row_bytes(entry))

    def where(self, name: str) -> str:
        return str(self._file.path)

    def _rows(self, entry: _Entry, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in Hugging Face's order: a view of the file where that is the file's."""
        import torch

        if not entry.heads:
            return self._stored(entry, start, stop)
        size = entry.shape[0] // entry.heads
        row = torch.arange(start, stop, device="cpu")
        # Hugging Face's halves of a head are llama.cpp's even and odd rows.
        head, within = row // size, row % size
        source = head * size + within % (size // 2) * 2 + within // (size // 2)
        first, last = start // size * size, -(-stop // size) * size
        return self._stored(entry, first, last)[source - first]

    def _stored(self, entry: _Entry, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as they lie in the file; of one dimension, elements."""
        import torch

        size = _row_bytes(entry)
        dtype: torch.dtype = getattr(torch, entry.tensor.dtype)
        offset = entry.start + start * size
        raw = torch.frombuffer(self._file.data, dtype=torch.uint8, count=(stop - start) * size, offset=offset)
        if offset % dtype.itemsize:
            raw = raw.clone()
        values = raw.view(dtype)
        if len(entry.shape) > 1:
            values = values.view(stop - start, -1)
        return values.float() + entry.shift if entry.shift else values

    def _drop(self, start: int, stop: int) -> None:
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is not None:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._file.data.madvise(advice, first, stop - first)

    def _named(self, tensor: StoredTensor) -> Iterator[tuple[str, _Entry]]:
        """``tensor`` by Hugging Face's name, experts one by one; one that is unknown keeps its own."""
        module, _, part = tensor.name.rpartition(".")
        layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)", module)
        local = self._kind.layer.get(layer[2]) if layer else TOP.get(module)
        if local is None or part not in ("weight", "bias"):
            yield tensor.name, _Entry(tensor, tensor.shape, tensor.start)
            return
        if tensor.block and (part == "bias" or len(tensor.shape) == 1):
            raise self._file.error(
                f"tensor {tensor.name!r} is {tensor.type}; biases and norms must be F32, F16 or BF16"
            )
        name = f"model.layers.{layer[1]}.{local}" if layer else local
        suffix = tensor.type.lower() if tensor.block else part
        if "{expert}" in name:
            if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
                raise self._file.error(
                    f"tensor {tensor.name!r} must be [experts, outputs, inputs] of at most {MAX_EXPERTS} experts, found "
                    f"{list(tensor.shape)}"
                )
            experts, rows, _ = tensor.shape
            for expert in range(experts):
                start = tensor.start + expert * rows * tensor.row_bytes
                yield f"{name.format(expert=expert)}.{suffix}", _Entry(tensor, tensor.shape[1:], start)
            return
        shape = tensor.shape
        if layer and layer[2] == "ffn_gate_inp_shexp" and len(shape) == 1:
            shape = (1, *shape)
        shift = -1.0 if self._kind.shifted and module.endswith("norm") else 0.0
        yield (
            f"{name}.{suffix}",
            _Entry(tensor, shape, tensor.start, self._heads(tensor, layer and layer[2]), shift),
        )

    def _heads(self, tensor: StoredTensor, local: str | None) -> int:
        """Heads whose rows are out of order, 0 if none are."""
        if not self._kind.permuted or local not in ("attn_q", "attn_k"):
            return 0
        count: int = self._file.require("llama.attention.head_count", int)
        if local == "attn_k":
            count = self._file.get("llama.attention.head_count_kv", int, count)
        if count < 1 or tensor.shape[0] % (2 * count):
            raise self._file.error(
                f"tensor {tensor.name!r} has {tensor.shape[0]} outputs, which {count} heads of an even size do not divide"
            )
        return count


def _row_bytes(entry: _Entry) -> int:
    """Bytes of a row, or of an element where there is one dimension."""
    tensor = entry.tensor
    return tensor.row_bytes if len(entry.shape) > 1 else tensor.row_bytes // tensor.shape[-1]
