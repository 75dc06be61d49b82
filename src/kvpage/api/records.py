"""The frozen records that plugin hooks return. ``factory`` is an import string, "package.module:Name", so that
finding plugins imports nothing heavy; the engine imports it when it is chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvpage.errors import PluginError


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records.

    Attributes:
        name: unique among records of its kind; users choose by it.
        factory: "package.module:Name".

    Raises:
        PluginError: name or factory are malformed.
    """

    name: str
    factory: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise PluginError(
                f"{type(self).__name__} has the name {self.name!r}: use letters, digits, '-', '_', '.'"
            )
        if not re.fullmatch(r"[\w.]+:\w+", self.factory):
            raise PluginError(
                f"{type(self).__name__} {self.name!r} has the factory {self.factory!r}: "
                "it must look like 'package.module:Name'"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionBackendRecord(Record):
    """``factory`` names a subclass of ``kvpage.api.attention.AttentionBackend``. Where several fit, the highest
    ``priority`` is taken, then the first name."""

    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """``factory`` names a function (HFConfig, *, max_model_len) -> ModelDefinition for these ``architectures``
    (entries of config.json's "architectures")."""

    architectures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LogitsProcessorRecord(Record):
    """``factory`` names a ``kvpage.api.sampling.LogitsProcessor`` class; requests ask for it by name."""


@dataclass(frozen=True, kw_only=True)
class EventListenerRecord(Record):
    """``factory`` names a ``kvpage.api.events.EventListener`` class; every engine makes one."""


@dataclass(frozen=True, kw_only=True)
class CliCommandRecord(Record):
    """``factory`` names a function (argv: list[str]) -> exit status; ``help`` is its line in ``kvpage --help``."""

    help: str
