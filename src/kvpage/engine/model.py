"""The model of an engine: loaded from its source and built by a decoder backend, or run through transformers."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kvpage.api.model import CausalLM, ModelDefinition
from kvpage.config import EngineOptions, resolve_context
from kvpage.engine.backends import Backends
from kvpage.engine.held import holder
from kvpage.engine.quantization import SchemeChoice
from kvpage.engine.source import Source, open_weights
from kvpage.errors import CheckpointError
from kvpage.loading.memory import Arena, trim_heap
from kvpage.loading.weights import load_weights
from kvpage.models.fallback.attention import Refused
from kvpage.models.fallback.model import load_fallback
from kvpage.models.fallback.source import FallbackDefinition
from kvpage.plugins.selection import DUMMY

LOG = logging.getLogger("kvpage")


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What the runner calls, what computes it ("torch", or another decoder backend; "transformers"), and why that."""

    model: CausalLM
    decoder: str
    reason: str


def make_model(
    options: EngineOptions,
    source: Source,
    definition: ModelDefinition | FallbackDefinition,
    scheme: SchemeChoice | None,
    backends: Backends,
    arena: Arena,
) -> EngineModel:
    """Load and build ``definition``; weights of the engine's own lie in ``arena``.

    Raises:
        CheckpointError: its tensors are not what its config says, or a fallback model does not prove itself.
        ConfigError, PluginError: no decoder backend builds it.
    """
    device, dtype = backends.env.device, getattr(torch, backends.env.dtype)
    if isinstance(definition, FallbackDefinition):
        try:
            model = load_fallback(
                definition,
                dtype=dtype,
                device=device,
                dummy=options.load_format == DUMMY,
                max_model_len=resolve_context(options, definition.spec.max_position)[0],
                allocate=arena.allocate,
            )
        except Refused as refused:
            raise CheckpointError(
                f"{source.config.source}: {definition.spec.family} cannot run through transformers: {refused}"
            ) from refused
        return EngineModel(model, "transformers", "the model's own code")
    view = open_weights(options, source, definition)
    weights = load_weights(
        definition,
        view,
        dtype=dtype,
        device=device,
        arena=arena,
        scheme=None if scheme is None else scheme.open(view),
        hold=holder(
            backends.env.linear_kernels,
            device,
            backends.env.dtype,
            int8_activations=scheme is None or scheme.int8_activations,
        ),
    )
    trim_heap()  # of what tensors were while they were unpacked
    for warning in weights.warnings:
        LOG.warning("%s", warning)
    built = backends.build(definition.spec, weights.weights, owned=not view.shared)
    return EngineModel(built.model, built.record.name, built.reason)
