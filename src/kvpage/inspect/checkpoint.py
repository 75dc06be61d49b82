"""A checkpoint as a plan sees it: config and file headers, never a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.model import ModelDefinition
from kvpage.config import EngineOptions
from kvpage.errors import CheckpointError, KvpageError
from kvpage.inspect.model_size import PlannedModel, StoredTensor, read_headers, stored_tensors
from kvpage.loading.locate import find_folder
from kvpage.models.define import choose_path, describe_path
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry
from kvpage.plugins.discovery import describe
from kvpage.plugins.factories import load_class
from kvpage.plugins.selection import SAFETENSORS, choose_reader


def planned_model(options: EngineOptions, registry: PluginRegistry) -> PlannedModel:
    """What ``options.model`` names: a folder (a config.json is enough), a hub id, or "demo".

    Raises:
        CheckpointError: there is no such checkpoint, or kvpage cannot run its architecture.
        ConfigError: ``max_model_len`` is beyond the model's context.
    """
    readers = registry.checkpoint_readers()
    path = find_folder(options, weights=False, files=[pattern for r in readers for pattern in r.files])
    record = choose_reader(readers, options.load_format, path).record
    stored: Mapping[str, StoredTensor]
    if record.name == SAFETENSORS:  # what its reader would say, without the torch that it imports
        config = HFConfig.from_folder(path.parent if path.is_file() else path)
        stored = read_headers(path)
    else:
        config, stored = _ask_reader(load_class(record, CheckpointReader), path)
    definition, _ = choose_path(
        registry.find_family,
        config,
        options,
        folder=path.parent if path.is_file() else path,
    )
    schemes = registry.quantization_schemes()
    return PlannedModel(
        name=str(options.model),
        spec=definition.spec,
        dtype=config.dtype or "float32",
        weights=definition.weights if isinstance(definition, ModelDefinition) else {},
        model_path=describe_path(definition),
        stored=stored,
        quantization_config=config.quantization or {},
        schemes={name: record for record in schemes for name in (record.name, *record.methods)},
        on_the_fly=tuple(record.name for record in schemes if not record.methods),
    )


def _ask_reader(kind: type[CheckpointReader], path: Path) -> tuple[HFConfig, Mapping[str, StoredTensor]]:
    """Config and tensors by a plugin's reader.

    Raises:
        CheckpointError: whatever it raises.
    """
    try:
        reader = kind(path)
        return HFConfig(reader.config(), source=str(path)), stored_tensors(reader.weights())
    except KvpageError:
        raise
    except Exception as error:  # foreign code
        raise CheckpointError(
            f"{path}: the checkpoint reader {kind.__name__} fails ({describe(error)})"
        ) from error
