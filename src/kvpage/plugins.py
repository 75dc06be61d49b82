"""PluginRegistry: finds plugins, keeps their records, chooses among them, and can say why."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import pluggy

from kvpage import hookspecs
from kvpage.api.attention import AttentionBackend, AttentionNeed
from kvpage.api.records import (
    AttentionBackendRecord,
    CliCommandRecord,
    EventListenerRecord,
    LogitsProcessorRecord,
    ModelRecord,
    Record,
    SchedulingPolicyRecord,
)
from kvpage.errors import CheckpointError, ConfigError, PluginError

BUILTIN = "kvpage.builtin.plugin"
R = TypeVar("R", bound=Record)


@dataclass(slots=True)
class PluginStatus:
    """One plugin as ``kvpage plugins list`` shows it; ``reason`` says why it is not active."""

    name: str
    origin: str
    version: str
    status: Literal["active", "failed"] = "active"
    reason: str = ""
    records: list[Record] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The attention backend that was chosen, and why each one before it in the order was not."""

    record: AttentionBackendRecord
    backend: type[AttentionBackend]
    block_size: int
    rejected: Sequence[tuple[str, Sequence[str]]]

    def explain(self) -> str:
        """One line a backend."""
        lines = [f"{name}: no: {'; '.join(reasons)}" for name, reasons in self.rejected]
        return "\n".join([*lines, f"{self.record.name}: chosen (priority {self.record.priority})"])


class PluginRegistry:
    """The plugins of one engine: an ordinary object, never a module global.

    Args:
        plugins: plugin objects (modules, or anything with hook implementations) to register besides.
        entry_points: also load what installed distributions offer in the entry-point group ``kvpage``.
        strict: raise on the first broken plugin instead of listing it with its error and going on.

    Raises:
        PluginError: in strict mode, a broken plugin; always, two records of one kind with the same name.
    """

    def __init__(
        self, plugins: Iterable[object] = (), *, entry_points: bool = True, strict: bool = False
    ) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._strict = strict
        self._statuses: list[PluginStatus] = []
        self._records: dict[type[Record], dict[str, Record]] = {}
        self._add(importlib.import_module(BUILTIN), PluginStatus("builtin", "kvpage", _version("kvpage")))
        for plugin in plugins:
            name = getattr(plugin, "__name__", type(plugin).__name__)
            self._add(plugin, PluginStatus(str(name), "given to PluginRegistry", ""))
        if entry_points:
            for point in sorted(
                importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda p: p.name
            ):
                self._add_entry_point(point)

    def statuses(self) -> list[PluginStatus]:
        """Every plugin that was found, broken ones included, in the order of registration."""
        return list(self._statuses)

    def attention_backends(self) -> list[AttentionBackendRecord]:
        """All of them, in the order of preference: priority down, then name."""
        return sorted(self._all(AttentionBackendRecord), key=lambda record: (-record.priority, record.name))

    def models(self) -> list[ModelRecord]:
        return self._all(ModelRecord)

    def logits_processors(self) -> list[LogitsProcessorRecord]:
        return self._all(LogitsProcessorRecord)

    def event_listeners(self) -> list[EventListenerRecord]:
        return self._all(EventListenerRecord)

    def scheduling_policies(self) -> list[SchedulingPolicyRecord]:
        return self._all(SchedulingPolicyRecord)

    def cli_commands(self) -> list[CliCommandRecord]:
        return self._all(CliCommandRecord)

    def model_for(self, architectures: Sequence[str]) -> ModelRecord:
        """The family that translates the first known one of a config's ``architectures``.

        Raises:
            CheckpointError: none is known; the message lists those that are.
        """
        by_architecture = {name: record for record in self.models() for name in record.architectures}
        for name in architectures:
            if name in by_architecture:
                return by_architecture[name]
        raise CheckpointError(
            f"architecture {', '.join(architectures) or '(none stated)'} is not supported; known: "
            f"{', '.join(sorted(by_architecture))}. A plugin can add it through the hook kvpage_models"
        )

    def select_attention_backend(self, need: AttentionNeed, explicit: str | None = None) -> BackendChoice:
        """The first backend, in order of preference, that can serve ``need``; or the one named, or an error.

        Raises:
            ConfigError: the named backend is unknown or lacks something, or no backend is left.
        """
        records = self.attention_backends()
        if explicit is not None:
            records = [record for record in records if record.name == explicit]
            if not records:
                known = ", ".join(record.name for record in self.attention_backends())
                raise ConfigError(f"attention_backend={explicit!r} is not registered; known: {known}")
        rejected: list[tuple[str, Sequence[str]]] = []
        for record in records:
            try:
                backend = cast("type[AttentionBackend]", load(record))
            except PluginError as error:
                rejected.append((record.name, [str(error)]))
                continue
            reasons = backend.caps.missing(need)
            if not reasons:
                size = need.block_size or backend.caps.preferred_block_size
                return BackendChoice(record, backend, size, rejected)
            rejected.append((record.name, reasons))
        lines = "; ".join(f"{name} lacks {', '.join(reasons)}" for name, reasons in rejected)
        raise ConfigError(f"no attention backend can serve this engine: {lines}")

    def _add_entry_point(self, point: importlib.metadata.EntryPoint) -> None:
        origin = point.dist.name if point.dist else point.value
        status = PluginStatus(point.name, origin, point.dist.version if point.dist else "")
        try:
            plugin = point.load()
        except Exception as error:  # a plugin's import may raise anything; it is listed, and the host goes on
            self._fail(status, error)
            return
        self._add(plugin, status)

    def _add(self, plugin: object, status: PluginStatus) -> None:
        """Register one plugin and take its records, or unregister it and keep the reason."""
        try:
            self._manager.register(plugin, name=status.name)
            self._manager.check_pending()
            status.records = self._collect(plugin)
            self._take(status)
        except Exception as error:  # whatever a plugin's hooks raise must not take the engine down
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            self._fail(status, error)
            return
        self._statuses.append(status)

    def _collect(self, plugin: object) -> list[Record]:
        records: list[Record] = []
        for name, kind in _HOOKS.items():
            for implementation in getattr(self._manager.hook, name).get_hookimpls():
                if implementation.plugin is not plugin:
                    continue
                for record in implementation.function():
                    if not isinstance(record, kind):
                        raise PluginError(f"{name} returned {record!r}, which is no {kind.__name__}")
                    records.append(record)
        return records

    def _take(self, status: PluginStatus) -> None:
        for record in status.records:
            if record.name in self._records.get(type(record), {}):
                owner = next(s.name for s in self._statuses if any(_same(r, record) for r in s.records))
                raise PluginError(
                    f"{type(record).__name__} {record.name!r} is already registered by {owner!r}: "
                    "rename one, or leave one plugin out"
                )
        for record in status.records:
            self._records.setdefault(type(record), {})[record.name] = record

    def _fail(self, status: PluginStatus, error: Exception) -> None:
        if self._strict:
            raise PluginError(f"plugin {status.name!r} ({status.origin}): {error}") from error
        status.status, status.reason, status.records = "failed", f"{type(error).__name__}: {error}", []
        self._statuses.append(status)

    def _all(self, kind: type[R]) -> list[R]:
        return cast("list[R]", list(self._records.get(kind, {}).values()))


def load(record: Record) -> Any:
    """What a record's factory names.

    Raises:
        PluginError: the module cannot be imported or lacks the name.
    """
    module, _, name = record.factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # importing foreign code may raise anything
        raise PluginError(f"{record.name}: {record.factory} cannot be imported: {error}") from error


_HOOKS: dict[str, type[Record]] = {
    "kvpage_attention_backends": AttentionBackendRecord,
    "kvpage_models": ModelRecord,
    "kvpage_logits_processors": LogitsProcessorRecord,
    "kvpage_event_listeners": EventListenerRecord,
    "kvpage_scheduling_policies": SchedulingPolicyRecord,
    "kvpage_cli_commands": CliCommandRecord,
}


def _same(one: Record, other: Record) -> bool:
    return type(one) is type(other) and one.name == other.name


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
