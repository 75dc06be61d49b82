"""A checkpoint's matrices as the plain numbers they stand for: what an engine's own readers and schemes make of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvpage import CheckpointError, PluginRegistry
from kvpage.api.model import ModelDefinition, WeightRef
from kvpage.api.parameters import Parameter, parameters
from kvpage.api.quant import CheckpointView, QuantScheme
from kvpage.config import EngineOptions
from kvpage.engine.quantization import find_scheme
from kvpage.engine.source import define_model, find_model, open_weights
from kvpage.loading.places import fits, present, ranges
from kvpage.loading.quantized import linears_of, packed_names, read_form
from kvpage.loading.weights import FLOATS


def dequantize_checkpoint(
    path: str | os.PathLike[str], plugins: PluginRegistry | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every matrix of the checkpoint at ``path``: linear layers, embedding and head, quantized ones and plain ones.

    A checkpoint may hold some modules only, even single layers: what its config promises and its files lack is
    skipped. Each matrix is read and dequantized when its turn comes.

    Args:
        path: a folder in Hugging Face layout, or a file that a registered reader takes (.gguf).
        plugins: the readers and schemes to choose from; by default those that are installed.

    Returns:
        (name, weight) in the order a step uses them. ``name`` is the parameter's in transformers
        ("model.layers.0.self_attn.k_proj.weight"); several of kvpage's parameters in one matrix (Phi-3's qkv_proj)
        come as that matrix. ``weight`` is float32 [out, in], also where the files have [in, out] (GPT-2). Of experts
        that lie in one tensor of three dimensions each comes by the name it has in a checkpoint of one tensor each.

    Raises:
        CheckpointError: there is no such checkpoint, no family or scheme reads it, or it is damaged; also while the
            matrices are taken.
        PluginError: a scheme fails.
    """
    registry = PluginRegistry() if plugins is None else plugins
    options = EngineOptions(model=str(Path(path)), model_impl="kvpage")
    source = find_model(options, registry)
    definition, _ = define_model(options, source, registry)
    if not isinstance(definition, ModelDefinition):
        raise CheckpointError(f"{source.config.source} is of no registered model family")
    choice = find_scheme(options, source.config, registry)
    view = open_weights(options, source, definition)
    return _Matrices(definition, view, None if choice is None else choice.open(view)).values()


class _Matrices:
    """The matrices of ``definition`` that ``view`` holds, plain or as ``scheme`` stores them."""

    def __init__(self, definition: ModelDefinition, view: CheckpointView, scheme: QuantScheme | None) -> None:
        self._view, self._scheme, self._stated = view, scheme, definition.weights
        known = view.names() if scheme is None else packed_names(view)
        self._refs = {name: present(ref, known) for name, ref in definition.weights.items()}
        modules = _prefixes(view.names())
        self._parameters = [
            parameter
            for parameter in _matrices_of(definition)
            if self._refs[parameter.name].name.removesuffix(".weight") in modules
        ]

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        asked = [] if self._scheme is None else linears_of(self._scheme, self._parameters, self._refs)
        linears = {name: linear for linear in asked for name in linear.parameters}
        sharing: dict[str, list[Parameter]] = {}
        for parameter in self._parameters:
            ref = self._refs[parameter.name]
            sharing.setdefault(ref.name if ref.index is None else parameter.name, []).append(parameter)
        for members in sharing.values():
            first = members[0]
            form = None
            if self._scheme is not None and first.name in linears:
                form = read_form(self._scheme, linears[first.name], self._view)
            yield self._name(first), self._plain(members) if form is None else form.dequantize()

    def _name(self, parameter: Parameter) -> str:
        """transformers' name of the tensor that holds ``parameter``; a checkpoint of the bare model leaves its first
        part out."""
        found, stated = self._refs[parameter.name], self._stated[parameter.name]
        place: WeightRef | None = None if found.index is not None else stated
        while place is not None:
            if found.name in (place.name, place.name.partition(".")[2]):
                return place.name
            place = place.otherwise
        return stated.name

    def _plain(self, members: Sequence[Parameter]) -> torch.Tensor:
        """The plain matrix of ``members``, float32 [out, in]; a new tensor."""
        ref, view = self._refs[members[0].name], self._view
        where = f"{view.where(ref.name)}: tensor {ref.name!r}"
        if ref.name not in view.names():
            raise CheckpointError(
                f"{where} is missing, and others of its module are there; the checkpoint is incomplete, or its "
                "quantization_config does not say how it is quantized"
            )
        info = view.info(ref.name)
        expected = (sum(part.shape[0] for part in members), members[0].shape[1])
        place = ref if ref.index is not None else replace(ref, rows=None, every=None)
        if info.dtype not in FLOATS or not fits(info.shape, place, expected):
            raise CheckpointError(
                f"{where} should be a plain weight {list(expected)}, found {info.dtype} {list(info.shape)}; config.json "
                "and weights are not of one model"
            )
        stored = view.read(ref.name)
        entry = stored if place.index is None else stored[place.index]
        by_output = entry.t() if place.transpose else entry
        parts = [by_output[start:stop] for start, stop in ranges(place, by_output.shape[0])]
        return torch.cat(parts).to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _matrices_of(definition: ModelDefinition) -> Iterator[Parameter]:
    """The parameters of two dimensions that multiply or are looked up; a tied head too, which files may hold."""
    spec = definition.spec
    for parameter in parameters(spec):
        if parameter.kind != "norm" and len(parameter.shape) == 2:
            yield parameter
    if spec.head.tied and "head.weight" in definition.weights:
        yield Parameter("head.weight", (spec.vocab_size, spec.hidden_size), "linear", "head.weight")


def _prefixes(names: Collection[str]) -> set[str]:
    """ "a.b.c" -> "a", "a.b" and "a.b.c": whatever holds a tensor."""
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found
