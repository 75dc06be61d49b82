"""Where a model comes from: a folder or a living object, its config, its definition, its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpage.api.checkpoint import CheckpointReader
from kvpage.api.model import ModelDefinition
from kvpage.api.quant import CheckpointView
from kvpage.api.records import CheckpointReaderRecord
from kvpage.config import EngineOptions
from kvpage.errors import CheckpointError, ConfigError, KvpageError, PluginError
from kvpage.loading.locate import find_folder
from kvpage.loading.readers import DummyView, ModuleView
from kvpage.models.define import choose_path
from kvpage.models.fallback.source import FallbackDefinition
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry
from kvpage.plugins.discovery import describe
from kvpage.plugins.factories import load_class
from kvpage.plugins.selection import DUMMY, check_load_format, choose_reader

VIEW = ("shared", "names", "info", "read", "slices", "where")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a folder (or a file in it) and what reads it, or a living transformers model."""

    folder: Path | None
    module: Any
    config: HFConfig
    reader: CheckpointReader | None = None

    def own_tokenizer(self) -> tuple[str | None, Mapping[str, Any] | None]:
        """The tokenizer that the checkpoint itself holds, as the text of a tokenizer.json, and its tokenizer_config."""
        if self.reader is None or self.folder is None:
            return None, None
        name = type(self.reader).__name__
        text: str | None = _ask(name, self.folder, self.reader.tokenizer)
        if text is None:
            return None, None
        stated: Mapping[str, Any] | None = _ask(name, self.folder, self.reader.tokenizer_config)
        return text, stated

    def own_generation_config(self) -> Mapping[str, Any] | None:
        """The generation_config that the checkpoint itself holds."""
        if self.reader is None or self.folder is None:
            return None
        stated: Mapping[str, Any] | None = _ask(
            type(self.reader).__name__, self.folder, self.reader.generation_config
        )
        return stated


def find_model(options: EngineOptions, registry: PluginRegistry, *, weights: bool = True) -> Source:
    """The folder, file or object that ``options.model`` names, and its config.

    ``weights=False``: of one on the hub, the config is enough.

    Raises:
        ConfigError: ``load_format`` names no reader.
        CheckpointError: there is no such model, or its config cannot be read.
    """
    model = options.model
    readers = registry.checkpoint_readers()
    check_load_format(options.load_format, [record.name for record in readers])
    if not isinstance(model, (str, os.PathLike)):
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise ConfigError(
                f"model must be a folder, a hub id, 'demo' or a transformers model, got {model!r:.80}"
            )
        return Source(None, model, living_config(model))
    path = find_folder(
        options, weights=weights, files=[pattern for record in readers for pattern in record.files]
    )
    record = choose_reader(readers, options.load_format, path).record
    reader = open_reader(record, path)
    folder = path.parent if path.is_file() else path
    stated = _ask(record.name, path, reader.config)
    if not isinstance(stated, Mapping):
        raise PluginError(f"checkpoint reader {record.name!r}: config() returned {stated!r:.80}, no mapping")
    beside = folder / "config.json"
    own_file = beside if path.is_dir() and beside.is_file() else path
    return Source(folder, None, HFConfig(stated, source=str(own_file)), reader)


def open_reader(record: CheckpointReaderRecord, path: Path) -> CheckpointReader:
    """The reader of ``record`` for ``path``.

    Raises:
        PluginError: it cannot be imported or breaks its contract.
        CheckpointError: it cannot be made for ``path``.
    """
    kind = load_class(record, CheckpointReader)
    reader: CheckpointReader = _ask(record.name, path, lambda: kind(path))
    return reader


def _ask(name: str, path: Path, question: Callable[[], Any]) -> Any:
    """What a reader answers; what it raises, foreign code that it is, as an error of the checkpoint."""
    try:
        return question()
    except (KvpageError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint reader {name!r} fails ({describe(error)}): load_format names "
            "another one, or leave its plugin out"
        ) from error


def living_config(model: Any) -> HFConfig:
    """The config of a transformers model in memory; a model made from a config alone states neither its own
    class nor the dtype of its weights."""
    dtype = next(iter(model.state_dict().values())).dtype
    stated = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(dtype)}
    return HFConfig(stated, source=type(model).__name__)


def define_model(
    options: EngineOptions, source: Source, registry: PluginRegistry
) -> tuple[ModelDefinition | FallbackDefinition, int]:
    """(the model, its context length), by the path that it runs."""
    return choose_path(
        registry.find_family,
        source.config,
        options,
        folder=source.folder,
        module=source.module,
    )


def open_weights(options: EngineOptions, source: Source, definition: ModelDefinition) -> CheckpointView:
    """The tensors that ``definition`` is loaded from."""
    if source.folder is None:
        return ModuleView(source.module)
    if options.load_format == DUMMY:
        return DummyView(definition)
    if source.reader is None:
        raise PluginError(f"{source.folder} was opened without a reader")
    name = type(source.reader).__name__
    view: CheckpointView = _ask(name, source.folder, source.reader.weights)
    lacking = [part for part in VIEW if not hasattr(view, part)]
    if lacking:
        raise PluginError(
            f"checkpoint reader {name}: weights() returned {view!r:.80}, which lacks {', '.join(lacking)} of "
            "kvpage.api.quant.CheckpointView"
        )
    return view
