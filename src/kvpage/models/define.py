"""From a config to a model as data, for the context length an engine is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from kvpage.api.model import ModelDefinition
from kvpage.config import EngineOptions, resolve_context
from kvpage.models.hf_config import HFConfig


def define(
    translate: Callable[..., object], config: HFConfig, options: EngineOptions
) -> tuple[ModelDefinition, int]:
    """(the model, its own context length), by a family's ``translate``.

    Twice, because rope frequencies may be fixed for ``max_model_len``, whose limit only the family can tell.

    Raises:
        CheckpointError: the config has a value that kvpage cannot run.
        ConfigError: ``max_model_len`` is beyond the model's context.
    """
    context = cast(ModelDefinition, translate(config, max_model_len=None)).spec.max_position
    max_model_len, _ = resolve_context(options, context)
    return cast(ModelDefinition, translate(config, max_model_len=max_model_len)), context
