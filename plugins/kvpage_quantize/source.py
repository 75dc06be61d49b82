"""The checkpoint that is quantized: where it lies, what its config says, and which of its tensors are linear weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpage import CheckpointError, PluginRegistry
from kvpage.api.checkpoint import read_config
from kvpage.api.model import DecoderSpec, WeightMap, WeightRef
from kvpage.api.parameters import parameters
from kvpage.api.quant import CheckpointView
from kvpage.config import EngineOptions
from kvpage.inspect.checkpoint import planned_model
from kvpage.loading.locate import find_folder
from kvpage.loading.readers import open_checkpoint

FLOATS = ("float32", "float16", "bfloat16")
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")
"""Suffixes that only quantized weights have."""

STAYS_PLAIN = ("head.weight", ".router.weight", ".shared_gate.weight")
"""kvpage's names of linear weights that no method touches: they are small, or errors in them are dear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """``name`` is what the command line said; ``config`` is config.json as it stands."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    spec: DecoderSpec
    weights: WeightMap
    view: CheckpointView

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return self.spec.max_position

    def linear_tensors(self) -> list[str]:
        """Tensors [out, in] of linear layers, in the file's order; those in ``STAYS_PLAIN`` are not among them.

        Raises:
            CheckpointError: a matrix of this model is stored in a way that these formats have no place for.
        """
        names = set(self.view.names())
        found: set[str] = set()
        for parameter in parameters(self.spec):
            if parameter.kind != "linear" or parameter.name.endswith(STAYS_PLAIN):
                continue
            ref = _present(self.weights[parameter.name], names)
            if ref.name not in names:
                raise CheckpointError(
                    f"{self.view.where(ref.name)}: tensor {ref.name!r} is missing; the checkpoint is incomplete, or its "
                    "config.json belongs to another model"
                )
            if ref.transpose or ref.index is not None or not ref.name.endswith(".weight"):
                kind = "[in, out]" if ref.transpose else "with all experts in one tensor"
                raise CheckpointError(
                    f"{self.view.where(ref.name)}: {ref.name!r} is stored {kind}, which compressed-tensors has no place "
                    "for; quantize while loading instead: --quantization int8 with any command that runs a model"
                )
            self._check(ref.name)
            found.add(ref.name)
        return [name for name in self.view.names() if name in found]

    def tables(self) -> set[str]:
        """Tensors that are looked up by row: embeddings."""
        names = set(self.view.names())
        held = [p for p in parameters(self.spec) if p.kind == "table"]
        return {_present(self.weights[p.name], names).name for p in held}

    def _check(self, name: str) -> None:
        info = self.view.info(name)
        if info.dtype not in FLOATS or len(info.shape) != 2:
            raise CheckpointError(
                f"{self.view.where(name)}: tensor {name!r} should be a matrix of {', '.join(FLOATS)}, found "
                f"{info.dtype} {list(info.shape)}; give the unquantized checkpoint"
            )


def open_source(name: str, *, revision: str | None = None) -> Source:
    """The unquantized checkpoint that ``name`` means: a folder, a hub id, or "demo".

    Raises:
        CheckpointError: there is none, kvpage cannot run its architecture, or it is quantized already.
    """
    folder = find_folder(EngineOptions(model=name, revision=revision))
    config = read_config(folder)
    view = open_checkpoint(folder)
    _refuse_quantized(folder, config, view)
    model = planned_model(EngineOptions(model=str(folder)), PluginRegistry())
    if not isinstance(model.spec, DecoderSpec) or not model.weights:
        raise CheckpointError(
            f"{folder}: kvpage runs {', '.join(config.get('architectures') or ['this model'])} through transformers only "
            "and does not know which of its tensors are linear layers; see docs/models.md for those it knows"
        )
    return Source(name=name, folder=folder, config=config, spec=model.spec, weights=model.weights, view=view)


def _refuse_quantized(folder: Path, config: Mapping[str, Any], view: CheckpointView) -> None:
    stated = config.get("quantization_config") or config.get("compression_config")
    if isinstance(stated, Mapping):
        method = stated.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder} is quantized already ({method}); quantizing twice adds the errors up: give the checkpoint it was "
            "made from"
        )
    packed = next((name for name in view.names() if name.endswith(PACKED)), None)
    if packed is not None:
        raise CheckpointError(
            f"{view.where(packed)}: tensor {packed!r} is of a quantized checkpoint, though config.json does not say so; "
            "give the checkpoint it was made from"
        )


def _present(ref: WeightRef, names: set[str]) -> WeightRef:
    while ref.name not in names and ref.otherwise is not None:
        ref = ref.otherwise
    return ref
