"""From a config to a model as data, for the context length an engine is asked for; and by which path it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvpage.api.model import ModelDefinition
from kvpage.config import EngineOptions, resolve_context
from kvpage.errors import CheckpointError
from kvpage.models.hf_config import HFConfig

if TYPE_CHECKING:
    from kvpage.models.fallback.source import FallbackDefinition


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


def choose_path(
    find_family: Callable[[tuple[str, ...]], Callable[..., object]],
    config: HFConfig,
    options: EngineOptions,
    *,
    folder: Path | None = None,
    module: Any = None,
) -> tuple[ModelDefinition | FallbackDefinition, int]:
    """(the model, its own context length): by the family of its architecture; else through transformers.

    ``options.model_impl`` may ask for one of the two. ``find_family`` raises CheckpointError where there is none.

    Raises:
        CheckpointError: neither path runs it; the message has the reason of each.
        ConfigError: ``max_model_len`` is beyond the model's context.
    """
    no_family = ""
    if options.model_impl != "transformers":
        try:
            translate = find_family(config.architectures)
        except CheckpointError as unknown:
            if options.model_impl == "kvpage":
                raise
            no_family = str(unknown)
        else:
            return define(translate, config, options)
    return _define_fallback(config, options, folder, module, no_family)


def describe_path(definition: ModelDefinition | FallbackDefinition) -> str:
    """By which path a model runs, for the log and for a plan."""
    if isinstance(definition, ModelDefinition):
        return f"family {definition.spec.family}"
    return (
        f"transformers fallback ({definition.spec.family}): its own code with attention in paged KV, slower than "
        "a family"
    )


def _define_fallback(
    config: HFConfig, options: EngineOptions, folder: Path | None, module: Any, no_family: str
) -> tuple[FallbackDefinition, int]:
    # Here, so that a plan for a model of a family loads no torch.
    from kvpage.models.fallback.attention import Refused
    from kvpage.models.fallback.source import define_fallback

    try:
        if config.quantization is not None or options.quantization is not None:
            raise Refused("it is quantized, and the weights of that path are plain")
        definition = define_fallback(
            config,
            folder=folder,
            module=module,
            trust_remote_code=options.trust_remote_code,
            max_model_len=options.max_model_len,
        )
    except Refused as refused:
        asked = no_family or f"{config.source}: model_impl='transformers'"
        raise CheckpointError(f"{asked}. Through transformers it cannot run either: {refused}" if no_family else
                              f"{asked}: it cannot run through transformers: {refused}") from refused  # fmt: skip
    context = definition.spec.max_position
    resolve_context(options, context)
    return definition, context
