"""The frozen records that plugin hooks return. ``factory`` is an import string, "package.module:Name", so that
finding plugins imports nothing heavy; the engine imports it when it is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvpage.errors import ConfigError, PluginError

FIELD_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
MAX_BITS = 64


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records.

    Attributes:
        name: unique among records of its kind; users choose by it.
        factory: "package.module:Name".
        needs: modules besides the plugin's own that the factory imports ("fastapi"); where one is not installed
            the record is listed with ``install`` and never chosen.
        install: what to type then: "pip install 'kvpage-mychip[driver]'".
        describe: "package.module:function", called without arguments, returns lines of text: what was built, what of
            it this machine can run, what was chosen and why. ``kvpage collect-env`` and ``kvpage plugins explain``
            show them, one time for all records that name the same function.

    Raises:
        PluginError: name, factory or describe are malformed, or a field holds another type.
    """

    name: str
    factory: str
    needs: tuple[str, ...] = ()
    install: str = ""
    describe: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise PluginError(
                f"{type(self).__name__} has the name {self.name!r}: use letters, digits, '-', '_', '.'"
            )
        if not isinstance(self.factory, str) or not re.fullmatch(r"[\w.]+:\w+", self.factory):
            raise PluginError(
                f"{type(self).__name__} {self.name!r} has the factory {self.factory!r}: "
                "it must look like 'package.module:Name'"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_of(value, str(field.type)):
                raise PluginError(
                    f"{type(self).__name__} {self.name!r} has {field.name}={value!r:.80}: it must be {field.type}"
                )
        if self.describe and not re.fullmatch(r"[\w.]+:\w+", self.describe):
            self._refuse("describe", "it must look like 'package.module:function'")

    def _refuse(self, field: str, must: str) -> None:
        """Raises PluginError: the value of ``field`` is not what it must be."""
        raise PluginError(
            f"{type(self).__name__} {self.name!r} has {field}={getattr(self, field)!r:.80}: {must}"
        )


def _is_of(value: object, wanted: str) -> bool:
    """Whether ``value`` is of an annotation that records use; any other annotation is a plugin's own affair."""
    if wanted == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    types = FIELD_TYPES.get(wanted)
    return types is None or (isinstance(value, types) and not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class AttentionBackendRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.attention.AttentionBackend``. Where several fit, the highest
    ``priority`` is taken, then the first name."""

    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class DecoderBackendRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.decoder.DecoderBackend``. Where several fit, the highest
    ``priority`` is taken, then the first name; the torch decoder has -100."""

    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointReaderRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.checkpoint.CheckpointReader``.

    ``files``: shell patterns; the reader is taken for a folder that holds a file matching one of them, or for
    such a file itself ("*.gguf"). The first name in the order of registration wins; ``load_format`` names one.
    """

    files: tuple[str, ...]
    summary: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.files) or not self.files:
            self._refuse("files", "it must name at least one pattern of files, such as '*.gguf'")


@dataclass(frozen=True, kw_only=True)
class QuantizationSchemeRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.quant.QuantScheme``.

    Attributes:
        methods: values of a checkpoint's ``quantization_config.quant_method`` that it reads; empty for a scheme
            that only quantizes plain weights while they load (``quantization=name``).
        bits: of a stored weight, without its scales: what ``kvpage plan`` counts before there are files.
        groups: of a scheme that quantizes plain weights: inputs that share a scale of 16 bits, the first that
            divides a matrix's inputs; a matrix that none divides has 8 bits. Empty: one float32 scale an output.
        packs_head: the output head and the token embedding are packed too, but with ``quantize_head`` false.
        options: keys of the engine's ``quantization_config`` that a scheme that quantizes plain weights takes.
    """

    methods: tuple[str, ...] = ()
    bits: float = 16.0
    summary: str = ""
    groups: tuple[int, ...] = ()
    packs_head: bool = False
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.bits <= MAX_BITS:
            self._refuse("bits", f"a stored weight has more than 0 and at most {MAX_BITS} bits")
        if not all(isinstance(group, int) and group > 0 for group in self.groups):
            self._refuse("groups", "sizes of groups are positive integers")

    def check_options(self, config: Mapping[str, object]) -> None:
        """Raises ConfigError where ``quantization_config`` has a key that this scheme does not take."""
        unknown = [key for key in config if key not in self.options]
        if unknown:
            known = f"it takes {', '.join(self.options)}" if self.options else "it takes none: leave it out"
            raise ConfigError(f"quantization_config has {unknown[0]!r}, unknown to {self.name!r}; {known}")


@dataclass(frozen=True, kw_only=True)
class LinearKernelRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.quant.LinearKernel``. Each weight goes to the first kernel that
    supports its form, by ``priority`` (highest first), then name; the reference has -100."""

    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class SamplingKernelRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.sampling.SamplingKernel``. Of those that are for the engine's device
    and can be made there, the highest ``priority`` is taken, then the first name; the torch kernel has -100.

    Attributes:
        devices: types of torch devices ("cuda"); empty = any.
    """

    devices: tuple[str, ...] = ()
    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """``factory`` names a function (ModelConfig, *, max_model_len: int | None) -> ModelDefinition, types of
    ``kvpage.api.model``, for these ``architectures`` (entries of config.json's "architectures").

    It is called with ``max_model_len=None`` first, to learn the model's context, then with the engine's; only rope
    frequencies may depend on it.
    """

    architectures: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.architectures) or not self.architectures:
            self._refuse("architectures", "it must name at least one, such as 'LlamaForCausalLM'")


@dataclass(frozen=True, kw_only=True)
class LogitsProcessorRecord(Record):
    """``factory`` names a ``kvpage.api.sampling.LogitsProcessor`` class; requests ask for it by name."""


@dataclass(frozen=True, kw_only=True)
class ProposerRecord(Record):
    """``factory`` names a ``kvpage.api.speculative.Proposer`` class. Provisional: listed, not yet used."""


@dataclass(frozen=True, kw_only=True)
class SchedulingPolicyRecord(Record):
    """``factory`` names a ``kvpage.api.scheduling.SchedulingPolicy`` class; ``scheduling_policy=name`` takes it."""

    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class KVConnectorRecord(Record):
    """``factory`` names a ``kvpage.api.kv.KVConnector`` class. Provisional: listed, not yet used."""


@dataclass(frozen=True, kw_only=True)
class EventListenerRecord(Record):
    """``factory`` names a ``kvpage.api.events.EventListener`` class; every engine makes one."""


@dataclass(frozen=True, kw_only=True)
class CliCommandRecord(Record):
    """``factory`` names a function (argv: list[str]) -> exit status; ``help`` is its line in ``kvpage --help``."""

    help: str


@dataclass(frozen=True, kw_only=True)
class HookRecord(Record):
    """A hook that a plugin adds for other plugins to implement (``kvpage_addhooks``).

    ``name`` is the hook's ("kvpage_server_routes"), ``factory`` names the record class that its implementations
    return, ``summary`` says what for. The hook takes no arguments; ``PluginRegistry.records`` reads it.
    """

    summary: str = ""
