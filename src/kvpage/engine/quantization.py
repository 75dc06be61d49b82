"""Which quantization scheme an engine loads its weights through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpage.api.quant import CheckpointView, QuantScheme
from kvpage.api.records import QuantizationSchemeRecord
from kvpage.config import EngineOptions
from kvpage.errors import CheckpointError, ConfigError, KvpageError, PluginError
from kvpage.models.hf_config import HFConfig
from kvpage.plugins import PluginRegistry
from kvpage.plugins.discovery import describe
from kvpage.plugins.factories import load_class

HOOK = "kvpage_quantization_schemes"
INT8_ACTIVATIONS = "int8_activations"
"""The key of the engine's ``quantization_config`` for a checkpoint that is quantized already."""


@dataclass(frozen=True, slots=True)
class SchemeChoice:
    """A scheme and the ``quantization_config`` it is made with: the checkpoint's, or the engine option of that name
    for a scheme that quantizes plain weights.

    ``int8_activations``: kernels may round activations to int8 where the format allows it. ``source``: the file that
    states ``config``, for error messages.
    """

    record: QuantizationSchemeRecord
    kind: type[QuantScheme]
    config: Mapping[str, Any] = field(default_factory=dict)
    int8_activations: bool = True
    source: str = ""

    def open(self, view: CheckpointView) -> QuantScheme:
        """The scheme for the tensors of ``view``.

        Raises:
            CheckpointError: ``config`` has a value that it does not know.
            PluginError: the scheme's own code fails.
        """
        try:
            scheme = self.kind.from_checkpoint(self.config, view)
        except CheckpointError as error:
            # Of a value of its config a scheme does not know the file.
            if not self.source or not str(error).startswith("quantization_config"):
                raise
            raise CheckpointError(f"{self.source}: {error}") from error
        except (KvpageError, MemoryError):
            raise
        except Exception as error:  # a plugin's code may raise anything
            raise PluginError(
                f"quantization scheme {self.record.name!r} cannot read this checkpoint's quantization_config "
                f"({describe(error)}): repair its plugin, or use the unquantized checkpoint"
            ) from error
        if not isinstance(scheme, QuantScheme):
            raise PluginError(
                f"quantization scheme {self.record.name!r}: from_checkpoint() returned {scheme!r:.80}, which is no "
                "kvpage.api.quant.QuantScheme: repair its plugin"
            )
        return scheme


def find_scheme(options: EngineOptions, config: HFConfig, registry: PluginRegistry) -> SchemeChoice | None:
    """What the checkpoint states or, for a plain one, ``options.quantization`` names; ``None``: weights stay plain.

    Raises:
        CheckpointError: the checkpoint is quantized and no scheme reads its format; ``quantization`` is unknown,
            contradicts the checkpoint, or needs a checkpoint of its format.
        ConfigError: ``quantization_config`` has a key that the scheme does not take.
        PluginError: the scheme cannot be imported.
    """
    records = registry.quantization_schemes()
    if config.quantization is not None:
        return _stated(options, config, config.quantization, records)
    if options.quantization is None:
        if options.quantization_config:
            raise ConfigError(
                f"quantization_config has the options of a scheme, {config.source} is not quantized, and quantization "
                "names none: give quantization='int8' (or another) too"
            )
        return None
    record = next((record for record in records if record.name == options.quantization), None)
    if record is None:
        record = next((record for record in records if options.quantization in record.methods), None)
    if record is None:
        raise CheckpointError(
            f"{config.source} is not quantized, and quantization={options.quantization!r} is no registered scheme; "
            f"{_known(records)}"
        )
    given = dict(options.quantization_config or {})
    choice = SchemeChoice(record, _load(record), given)
    if not choice.kind.quantizes_plain:
        on_the_fly = [other.name for other in records if not other.methods]
        raise CheckpointError(
            f"quantization={options.quantization!r} reads checkpoints quantized so, and {config.source} is not "
            f"quantized: leave it out, or take one that quantizes while loading ({_names(on_the_fly)})"
        )
    record.check_options(given)
    return choice


def _stated(
    options: EngineOptions,
    config: HFConfig,
    stated: Mapping[str, Any],
    records: list[QuantizationSchemeRecord],
) -> SchemeChoice:
    method = str(stated.get("quant_method", "unknown"))
    record = next((record for record in records if method in record.methods), None)
    if record is None:
        raise CheckpointError(
            f"{config.source} is quantized ({method}) and no loader for that is installed: {_known(records)}. Use the "
            "unquantized checkpoint, or install a plugin that reads it"
        )
    if options.quantization not in (None, method, record.name, *_aliases(record, method)):
        raise CheckpointError(
            f"quantization={options.quantization!r} contradicts {config.source}, which is quantized by {method!r}: "
            "leave the option out, or give the unquantized checkpoint"
        )
    given = dict(options.quantization_config or {})
    int8_activations = given.pop(INT8_ACTIVATIONS, True)
    if given or not isinstance(int8_activations, bool):
        raise ConfigError(
            f"quantization_config={dict(options.quantization_config or {})!r:.80}: {config.source} is quantized "
            f"({method}) and states its own; {INT8_ACTIVATIONS}, true or false, is what can be chosen"
        )
    if options.load_format == "dummy":
        raise ConfigError(
            f"load_format='dummy' makes plain weights, and {config.source} is quantized ({method}): remove its "
            "quantization_config"
        )
    return SchemeChoice(record, _load(record), stated, int8_activations, str(config.source))


def _aliases(record: QuantizationSchemeRecord, method: str) -> list[str]:
    """Names of ``method`` by the kernels that vLLM runs it with ("gptq_marlin")."""
    return [
        name for name in record.methods if name.startswith(f"{method}_") or name.replace("_", "-") == method
    ]


def _load(record: QuantizationSchemeRecord) -> type[QuantScheme]:
    kind: type[QuantScheme] = load_class(record, QuantScheme)
    return kind


def _known(records: list[QuantizationSchemeRecord]) -> str:
    names = [
        f"{record.name} (reads {', '.join(record.methods)})"
        if record.methods
        else f"{record.name} (quantizes plain weights)"
        for record in records
    ]
    return f"known are {', '.join(names) or 'none'}; plugins add others through the hook {HOOK}"


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none is installed"
