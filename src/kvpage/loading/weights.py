"""From a checkpoint's tensors to a decoder's weights: names, shapes, dtype, merging; one slice at a time.

Peak memory is the weights plus one slice: q, k and v (gate and up) are read straight into their rows of one
merged tensor, and the file's pages are let go behind the copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from kvpage.api.model import ModelDefinition, WeightRef
from kvpage.api.parameters import Parameter, parameters
from kvpage.api.quant import CheckpointView, Dense, QuantScheme, WeightForm
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena
from kvpage.loading.places import columns, entry_shape, fits, present, ranges
from kvpage.loading.quantized import QuantizedWeights, packed_names

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
KNOWN_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", "position_ids", ".g_idx")


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """``weights``: kvpage's parameter name -> form. ``warnings``: sentences for the log."""

    weights: Mapping[str, WeightForm]
    warnings: tuple[str, ...]


def load_weights(
    definition: ModelDefinition,
    view: CheckpointView,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    arena: Arena,
    scheme: QuantScheme | None = None,
    hold: Callable[[WeightForm], WeightForm | None] = lambda form: form,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedWeights:
    """Every parameter of ``definition``, in ``dtype`` on ``device``; CPU memory comes from ``arena``.

    Tensors of a shared view that already have ``dtype`` and ``device`` are taken as they are. Where the head is
    tied but the checkpoint has a head that differs from the embedding, the head is loaded too, as "head.weight".

    Args:
        scheme: gives the forms of the linear weights (and tables) that it holds; without one all are ``Dense``.
        hold: the form that is held in place of the scheme's; ``None``, where no kernel computes it packed: its
            values in ``dtype``.
        progress: called with (bytes so far, bytes in all) of the weights in ``dtype``.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than model or scheme expect.
        PluginError: ``scheme`` fails, or gives a form of another shape.
    """
    loader = _Loader(definition, view, dtype, torch.device(device), arena, scheme, hold, progress)
    return loader.load()


class _Loader:
    def __init__(
        self,
        definition: ModelDefinition,
        view: CheckpointView,
        dtype: torch.dtype,
        device: torch.device,
        arena: Arena,
        scheme: QuantScheme | None,
        hold: Callable[[WeightForm], WeightForm | None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._view, self._dtype, self._device, self._arena, self._progress = (
            view,
            dtype,
            device,
            arena,
            progress,
        )
        self._names = view.names()
        self._parameters = list(parameters(definition.spec))
        # A packed weight has no tensor of its own name, but others beside where that would be.
        packs = scheme is not None and not scheme.quantizes_plain
        known = packed_names(view) if packs else self._names
        self._refs = {name: present(ref, known) for name, ref in definition.weights.items()}
        if definition.spec.head.tied:
            self._untie(known)
        self._quantized = QuantizedWeights(
            scheme,
            view,
            self._parameters,
            self._refs,
            self._read_plain,
            self._plain_pieces,
            hold,
            dtype,
        )
        self._total = sum(_count(parameter) for parameter in self._parameters) * dtype.itemsize
        self._done = 0

    def load(self) -> LoadedWeights:
        for parameter in self._parameters:
            if parameter.name not in self._quantized.packed:
                self._check(parameter)
        self._check_shared_tensors()
        weights: dict[str, WeightForm] = {}
        for _, members in groupby(self._parameters, key=lambda parameter: parameter.block):
            block = list(members)
            weights.update(self._quantized.load(block, self._allocate))
            plain = [part for part in block if part.name not in weights]
            if plain:
                tensors = self._share(plain) or self._copy(plain)
                weights.update(
                    (part.name, Dense(tensor)) for part, tensor in zip(plain, tensors, strict=True)
                )
            self._done += sum(_count(part) for part in block) * self._dtype.itemsize
            if self._progress is not None:
                self._progress(self._done, self._total)
        return LoadedWeights(weights, (*self._unused(), *self._dequantized()))

    def _untie(self, known: Collection[str]) -> None:
        """Follow what the checkpoint holds where its config says that the head is the embedding."""
        embed, head = self._refs["embed.weight"], self._refs.get("head.weight")
        if head is None or head.name not in known:
            return
        packed = head.name not in self._names or embed.name not in self._names
        if embed.name not in known:
            self._refs["embed.weight"] = head
        elif packed or not self._equal(embed.name, head.name):
            shape = next(part.shape for part in self._parameters if part.name == "embed.weight")
            self._parameters.append(Parameter("head.weight", shape, "linear", "head.weight"))

    def _equal(self, first: str, second: str) -> bool:
        if self._view.info(first) != self._view.info(second):
            return False
        rows = self._view.info(first).shape[0]
        pairs = zip(self._view.slices(first, 0, rows), self._view.slices(second, 0, rows), strict=True)
        return all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs)

    def _check(self, parameter: Parameter) -> None:
        ref = self._refs[parameter.name]
        if ref.name not in self._names:
            self._refuse_packed(ref.name)
            raise CheckpointError(
                f"{self._view.where(ref.name)}: tensor {ref.name!r} of shape {list(parameter.shape)} is missing; "
                "the checkpoint is incomplete, or its config.json belongs to another model"
            )
        info = self._view.info(ref.name)
        if not fits(info.shape, ref, parameter.shape):
            place = "" if ref.rows is None else f" in outputs {ref.rows[0]} to {ref.rows[1]}"
            place += "" if ref.index is None else f" in entry {ref.index}"
            expected = list(parameter.shape[::-1] if ref.transpose else parameter.shape)
            raise CheckpointError(
                f"{self._view.where(ref.name)}: tensor {ref.name!r} should have shape {expected}{place} by config.json, "
                f"found {list(info.shape)}; config.json and weights are not of one model"
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{self._view.where(ref.name)}: tensor {ref.name!r} is {info.dtype}; weights are expected as "
                f"{', '.join(sorted(FLOATS))} (quantized checkpoints need a quantization_config and its plugin)"
            )

    def _refuse_packed(self, name: str) -> None:
        """Name the tensors of a quantized checkpoint whose config does not say so, or names another format."""
        module = name.rpartition(".")[0]
        packed = sorted(
            other.removeprefix(f"{module}.") for other in self._names if other.startswith(f"{module}.")
        )
        if packed and module:
            raise CheckpointError(
                f"{self._view.where(f'{module}.{packed[0]}')}: {name!r} is not there, but {', '.join(packed[:6])} of the "
                "same module are: the weights are quantized and config.json's quantization_config does not say how; "
                "restore it from where the checkpoint came from"
            )

    def _check_shared_tensors(self) -> None:
        """The parameters that share a tensor are all of it, or their rows would be others' (q's for k's)."""
        outputs: Counter[WeightRef] = Counter()
        for parameter in self._parameters:
            ref = self._refs[parameter.name]
            if ref.rows is not None and parameter.name not in self._quantized.packed:
                outputs[replace(ref, rows=None, every=None, otherwise=None)] += parameter.shape[0]
        for ref, used in outputs.items():
            shape = entry_shape(self._view.info(ref.name).shape, ref)
            found = shape[-1] if ref.transpose else shape[0]
            if found != used:
                raise CheckpointError(
                    f"{self._view.where(ref.name)}: tensor {ref.name!r} has {found} outputs, of which the model of "
                    f"config.json uses {used}; config.json and weights are not of one model"
                )

    def _share(self, block: list[Parameter]) -> list[torch.Tensor] | None:
        """The view's own tensors where they can be used as they are."""
        if not self._view.shared:
            return None
        tensors = []
        for parameter in block:
            ref = self._refs[parameter.name]
            tensor = self._view.read(ref.name).detach()
            usable = tensor.dtype == self._kept_as(parameter) and tensor.device == self._device
            if ref.every is not None or not usable:
                return None
            tensor = tensor if ref.index is None else tensor[ref.index]
            tensor = tensor.t() if ref.transpose else tensor
            tensors.append(tensor if ref.rows is None else tensor[ref.rows[0] : ref.rows[1]])
        return tensors

    def _copy(self, block: list[Parameter]) -> list[torch.Tensor]:
        """A tensor for the whole block, and each part read into its rows."""
        rows = sum(part.shape[0] for part in block)
        merged = self._allocate((rows, *block[0].shape[1:]), self._kept_as(block[0]))
        parts = list(merged.split([part.shape[0] for part in block]))
        for parameter, target in zip(block, parts, strict=True):
            self._fill(target, self._refs[parameter.name])
        return parts

    def _kept_as(self, parameter: Parameter) -> torch.dtype:
        return torch.float32 if parameter.kind == "float32" else self._dtype

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cpu":
            return self._arena.allocate(shape, dtype, huge_pages=True)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _read_plain(self, parameter: Parameter) -> torch.Tensor:
        """One weight [out, in] in the checkpoint's dtype; its memory goes back to the system with it."""
        ref = self._refs[parameter.name]
        dtype: torch.dtype = getattr(torch, self._view.info(ref.name).dtype)
        weight = Arena().allocate(parameter.shape, dtype)
        self._fill(weight, ref)
        return weight

    def _plain_pieces(self, parameter: Parameter) -> Iterator[torch.Tensor]:
        """The same, some outputs at a time: views of the file where they are stored so."""
        ref = self._refs[parameter.name]
        if ref.transpose:
            yield self._read_plain(parameter)
        else:
            yield from self._pieces(ref)

    def _fill(self, target: torch.Tensor, ref: WeightRef) -> None:
        """Read ``ref`` into ``target`` [out, ...]."""
        if ref.transpose:
            stored = entry_shape(self._view.info(ref.name).shape, ref)
            first = 0 if ref.index is None else ref.index * stored[0]
            taken = columns(ref, stored[1])
            at = 0
            for piece in self._view.slices(ref.name, first, first + stored[0]):
                target.t()[at : at + piece.shape[0]].copy_(piece[:, taken])
                at += piece.shape[0]
            return
        at = 0
        for piece in self._pieces(ref):
            target[at : at + piece.shape[0]].copy_(piece)
            at += piece.shape[0]

    def _pieces(self, ref: WeightRef) -> Iterator[torch.Tensor]:
        """The outputs of a ``ref`` that is not transposed, piece by piece."""
        stored = entry_shape(self._view.info(ref.name).shape, ref)
        first = 0 if ref.index is None else ref.index * stored[0]
        for start, stop in ranges(ref, stored[0]):
            yield from self._view.slices(ref.name, first + start, first + stop)

    def _unused(self) -> Iterator[str]:
        used = {ref.name for ref in self._refs.values()} | self._quantized.tensor_names
        unused = sorted(
            name
            for name in self._names
            if name not in used and not name.endswith(KNOWN_BUFFERS) and not self._adds_nothing(name)
        )
        if unused:
            some = ", ".join(unused[:4]) + (" ..." if len(unused) > 4 else "")
            yield f"{len(unused)} tensors of the checkpoint are not used by this model: {some}"

    def _dequantized(self) -> Iterator[str]:
        names = list(self._quantized.dequantized)
        if names:
            dtype = str(self._dtype).removeprefix("torch.")
            some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            yield (
                f"{len(names)} quantized weights are held in {dtype}, since no kernel on {self._device.type} computes "
                f"them packed: {some}"
            )

    def _adds_nothing(self, name: str) -> bool:
        """A bias of zeros beside a packed weight, as auto-gptq writes where the model has none."""
        module, _, part = name.rpartition(".")
        packed = part == "bias" and any(
            other.startswith(f"{module}.") for other in self._quantized.tensor_names
        )
        return packed and not bool(self._view.read(name).any())


def _count(parameter: Parameter) -> int:
    count = 1
    for size in parameter.shape:
        count *= size
    return count
