"""A checkpoint as a plan sees it: config and file headers, never a weight."""

from __future__ import annotations

from kvpage.config import EngineOptions
from kvpage.inspect.model_size import PlannedModel, read_headers
from kvpage.loading.locate import find_folder
from kvpage.models.define import define
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry, load


def planned_model(options: EngineOptions, registry: PluginRegistry) -> PlannedModel:
    """What ``options.model`` names: a folder (a config.json is enough), a hub id, or "demo".

    Raises:
        CheckpointError: there is no such checkpoint, or kvpage cannot run its architecture.
        ConfigError: ``max_model_len`` is beyond the model's context.
    """
    folder = find_folder(options, weights=False)
    config = HFConfig.from_folder(folder)
    definition, _ = define(load(registry.model_for(config.architectures)), config, options)
    return PlannedModel(
        name=str(options.model),
        spec=definition.spec,
        dtype=config.dtype or "float32",
        weights=definition.weights,
        stored=read_headers(folder),
        quantization_config=config.quantization or {},
    )
