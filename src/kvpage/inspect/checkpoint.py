"""A checkpoint as a plan sees it: config and file headers, never a weight."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from kvpage.api.model import ModelDefinition
from kvpage.config import EngineOptions, resolve_context
from kvpage.inspect.model_size import PlannedModel, read_headers
from kvpage.loading.hub import resolve
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry, load

BUNDLED_MODEL = "demo"


def planned_model(options: EngineOptions, registry: PluginRegistry) -> PlannedModel:
    """What ``options.model`` names: a folder (a config.json is enough), a hub id, or "demo".

    Raises:
        CheckpointError: there is no such checkpoint, or kvpage cannot run its architecture.
        ConfigError: ``max_model_len`` is beyond the model's context.
    """
    folder = find_folder(options)
    config = HFConfig.from_folder(folder)
    translate = load(registry.model_for(config.architectures))
    definition = cast(ModelDefinition, translate(config, max_model_len=None))
    length, _ = resolve_context(options, definition.spec.max_position)
    definition = cast(ModelDefinition, translate(config, max_model_len=length))
    return PlannedModel(
        name=str(options.model),
        spec=definition.spec,
        dtype=config.dtype or "float32",
        weights=definition.weights,
        stored=read_headers(folder),
        quantization_config=config.quantization or {},
    )


def find_folder(options: EngineOptions) -> Path:
    """The folder of a model; of one on the hub, a local copy in which no weights need be.

    Raises:
        CheckpointError: there is none.
    """
    if options.model == BUNDLED_MODEL:
        from kvpage import demo  # package data, needed by those who ask for it

        return demo.path()
    return resolve(
        str(options.model),
        revision=options.revision,
        download_dir=options.download_dir,
        token=options.hf_token,
        weights=False,
    )
