"""Where a model comes from: a folder or a living object, its config, its definition, its tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpage.api.model import ModelDefinition
from kvpage.api.quant import CheckpointView
from kvpage.config import EngineOptions
from kvpage.errors import ConfigError
from kvpage.loading.locate import find_folder
from kvpage.loading.readers import DummyView, ModuleView, open_checkpoint
from kvpage.models.define import define
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry, load


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a folder, or a living transformers model."""

    folder: Path | None
    module: Any
    config: HFConfig


def find_model(options: EngineOptions) -> Source:
    """The folder or object that ``options.model`` names, and its config."""
    model = options.model
    if not isinstance(model, (str, os.PathLike)):
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise ConfigError(
                f"model must be a folder, a hub id, 'demo' or a transformers model, got {model!r:.80}"
            )
        return Source(None, model, living_config(model))
    folder = find_folder(options)
    return Source(folder, None, HFConfig.from_folder(folder))


def living_config(model: Any) -> HFConfig:
    """The config of a transformers model in memory; a model made from a config alone states neither its own
    class nor the dtype of its weights."""
    dtype = next(iter(model.state_dict().values())).dtype
    stated = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(dtype)}
    return HFConfig(stated, source=type(model).__name__)


def define_model(
    options: EngineOptions, source: Source, registry: PluginRegistry
) -> tuple[ModelDefinition, int]:
    """(the model as data, its context length)."""
    config = source.config
    return define(load(registry.model_for(config.architectures)), config, options)


def open_weights(options: EngineOptions, source: Source, definition: ModelDefinition) -> CheckpointView:
    """The tensors that ``definition`` is loaded from."""
    if source.folder is None:
        return ModuleView(source.module)
    if options.load_format == "dummy":
        return DummyView(definition)
    return open_checkpoint(source.folder)
