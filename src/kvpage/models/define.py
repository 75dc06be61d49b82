"""From a config to a model as data, for the context length an engine is asked for; and by which path it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpage.api.model import DecoderSpec, ModelDefinition
from kvpage.config import EngineOptions, resolve_context
from kvpage.errors import CheckpointError, KvpageError, PluginError
from kvpage.models.checking import check_definition
from kvpage.models.hf_config import HFConfig

if TYPE_CHECKING:
    from kvpage.models.fallback.source import FallbackDefinition


def define(
    family: str, translate: Callable[..., object], config: HFConfig, options: EngineOptions
) -> tuple[ModelDefinition, int]:
    """(the model, its own context length), by the ``translate`` of the family of that name.

    Twice, because rope frequencies may be fixed for ``max_model_len``, whose limit only the family can tell.

    Raises:
        CheckpointError: the config has a value that kvpage cannot run.
        ConfigError: ``max_model_len`` is beyond the model's context.
        PluginError: the family fails, or its definition contradicts itself.
    """
    context = _translated(family, translate, config, None).spec.max_position
    max_model_len, _ = resolve_context(options, context)
    definition = _translated(family, translate, config, max_model_len)
    check_definition(family, definition)
    return definition, context


def _translated(
    family: str, translate: Callable[..., object], config: HFConfig, max_model_len: int | None
) -> ModelDefinition:
    try:
        found = translate(config, max_model_len=max_model_len)
    except (KvpageError, MemoryError):
        raise
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(
            f"model family {family!r} fails on {config.source} ({type(error).__name__}: {error}): repair its plugin, "
            "or leave it out"
        ) from error
    if not isinstance(found, ModelDefinition) or not isinstance(found.spec, DecoderSpec):
        raise PluginError(
            f"model family {family!r} returned {found!r:.80}, which is no kvpage.api.model.ModelDefinition with a "
            "DecoderSpec"
        )
    context = found.spec.max_position
    if type(context) is not int or context < 1:
        raise PluginError(f"model family {family!r}: max_position is {context!r:.80}, no number of tokens")
    return found


def choose_path(
    find_family: Callable[[tuple[str, ...]], tuple[str, Callable[..., object]]],
    config: HFConfig,
    options: EngineOptions,
    *,
    folder: Path | None = None,
    module: Any = None,
) -> tuple[ModelDefinition | FallbackDefinition, int]:
    """(the model, its own context length): by the family of its architecture; else through transformers.

    ``options.model_impl`` may ask for one of the two. ``find_family`` gives a family's name and its function, or
    raises CheckpointError where there is none.

    Raises:
        CheckpointError: neither path runs it; the message has the reason of each.
        ConfigError: ``max_model_len`` is beyond the model's context.
        PluginError: the family fails, or its definition contradicts itself.
    """
    no_family = ""
    if options.model_impl != "transformers":
        try:
            family, translate = find_family(config.architectures)
        except CheckpointError as unknown:
            if options.model_impl == "kvpage":
                raise
            no_family = str(unknown)
        else:
            try:
                return define(family, translate, config, options)
            except CheckpointError as refused:
                if not _fallback_takes(config, options, folder, module):
                    raise
                raise CheckpointError(
                    f"{refused}. transformers' own code takes it: give model_impl='transformers'"
                ) from refused
    return _define_fallback(config, options, folder, module, no_family)


def _fallback_takes(config: HFConfig, options: EngineOptions, folder: Path | None, module: Any) -> bool:
    """Whether ``model_impl="transformers"`` is a way out for what a family refuses, as far as a probe can tell."""
    try:
        _define_fallback(config, options, folder, module, "")
    except KvpageError:
        return False
    return True


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
        name = ", ".join(config.architectures)
        if not name:
            raise CheckpointError(f"{config.source}: {refused}") from refused
        place = "" if config.source == name else f"{config.source}: "
        reason = f"{place}{name} cannot run through transformers: {refused}"
        raise CheckpointError(f"{reason}. And {no_family}" if no_family else reason) from refused
    context = definition.spec.max_position
    resolve_context(options, context)
    return definition, context
