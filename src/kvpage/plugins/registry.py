"""PluginRegistry: the plugins of one engine, what they registered, and the choices among it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import TypeVar, cast

from kvpage.api.attention import AttentionNeed
from kvpage.api.model import DecoderEnv, DecoderSpec
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    CliCommandRecord,
    DecoderBackendRecord,
    EventListenerRecord,
    KVConnectorRecord,
    LinearKernelRecord,
    LogitsProcessorRecord,
    ModelRecord,
    ProposerRecord,
    QuantizationSchemeRecord,
    Record,
    SamplingKernelRecord,
    SchedulingPolicyRecord,
)
from kvpage.errors import CheckpointError, PluginError
from kvpage.plugins.collecting import HOOKS, SELECT, Collection
from kvpage.plugins.discovery import (
    BROKEN,
    Found,
    PluginStatus,
    ResolvedPlugin,
    ResolvedPlugins,
    describe,
    find_plugins,
    find_resolved,
)
from kvpage.plugins.factories import description, load
from kvpage.plugins.selection import BackendChoice, DecoderChoice, Trial, choose_attention, choose_decoder

R = TypeVar("R", bound=Record)
Prioritized = TypeVar(
    "Prioritized", AttentionBackendRecord, DecoderBackendRecord, LinearKernelRecord, SamplingKernelRecord
)


class PluginRegistry:
    """The plugins of one engine: an ordinary object, never a module global.

    A plugin that cannot be used (it raises, its hooks are misspelt, it needs a newer api, a name of its records is
    taken) is listed by ``statuses`` with the reason, nothing of it is kept, and the others go on. The order is:
    the builtin plugin, those given, entry points by name; who comes first keeps a name.

    Args:
        plugins: plugin objects (modules, or anything with hook implementations) to register besides.
        entry_points: also load what installed distributions offer in the entry-point group ``kvpage``, but what the
            environment variable ``KVPAGE_PLUGINS`` leaves out: "-name,+name", applied from left to right. "-name"
            leaves an installed plugin out, "-*" all of them; "+name" takes one back in, or imports the module
            of that name. Without ``entry_points`` the variable is not read.
        selection: text of that form in place of the variable.
        strict: raise on the first broken plugin instead of listing it with its error and going on.

    Raises:
        PluginError: in strict mode, a broken plugin or item of the selection; always, ``selection`` without
            ``entry_points``, ``plugins`` that is no list, or an argument of another type.
    """

    def __init__(
        self,
        plugins: Iterable[object] = (),
        *,
        entry_points: bool = True,
        selection: str | None = None,
        strict: bool = False,
    ) -> None:
        for option, value in (("entry_points", entry_points), ("strict", strict)):
            if not isinstance(value, bool):
                raise PluginError(f"{option} must be True or False, got {value!r:.80}")
        if not isinstance(selection, (str, NoneType)):
            raise PluginError(f"selection must be text such as '-name,+name', got {selection!r:.80}")
        if selection is not None and not entry_points:
            raise PluginError(
                f"selection={selection!r} chooses among installed plugins, and entry_points=False leaves them all "
                "out: drop one of the two"
            )
        self._take(find_plugins(plugins, entry_points=entry_points, selection=selection), strict)

    @classmethod
    def from_resolved(cls, resolved: ResolvedPlugins) -> PluginRegistry:
        """A registry with exactly the plugins of ``resolved``, whatever is installed here or in the environment.

        Raises:
            PluginError: one of them cannot be imported, or is broken here; or it is not what ``resolved`` gives.
        """
        if not isinstance(resolved, ResolvedPlugins) or not all(
            isinstance(plugin, ResolvedPlugin) for plugin in resolved.plugins
        ):
            raise PluginError(f"from_resolved takes what resolved() gave, got {resolved!r:.80}")
        registry = cls.__new__(cls)
        registry._take(find_resolved(resolved), strict=True)
        return registry

    def _take(self, found: list[Found], strict: bool) -> None:
        self._collection = Collection(found)
        self._statuses = [entry.status for entry in found]
        for entry in found:
            # The first is the builtin plugin, without which no engine could be made.
            if entry.error is not None and (strict or entry is found[0]):
                status = entry.status
                raise PluginError(
                    f"plugin {status.name!r} ({status.origin}): {status.reason}"
                ) from entry.error

    def resolved(self) -> ResolvedPlugins:
        """What is active here, to load exactly that in another process (``from_resolved``); it can be pickled.

        Raises:
            PluginError: an active plugin is an object of this process and no module that another can import.
        """
        active = [status for status in self._statuses[1:] if status.status == "active"]
        for status in active:
            if not status.value:
                raise PluginError(
                    f"plugin {status.name!r} ({status.origin}) is an object of this process, which no other can "
                    "import: put its hooks into a module of its own and give that"
                )
        return ResolvedPlugins(tuple(ResolvedPlugin(s.name, s.origin, s.version, s.value) for s in active))

    def statuses(self) -> list[PluginStatus]:
        """Every plugin that was found, broken ones included, in the order of registration."""
        return list(self._statuses)

    def records(self, hook: str) -> list[Record]:
        """What a hook's implementations registered, in the order of plugins; for hooks that plugins added, too.

        Raises:
            PluginError: there is no such hook.
        """
        if not isinstance(hook, str):
            raise PluginError(f"a hook is named by text, such as 'kvpage_models', got {hook!r:.80}")
        if hook not in HOOKS and hook not in self._collection.added:
            lost = self._collection.lost.get(hook)
            raise PluginError(lost or f"{hook} is no hook that registers; {self._collection.nearest(hook)}")
        return list(self._collection.records.get(hook, {}).values())

    def descriptions(self) -> dict[str, tuple[str, ...]]:
        """What plugins say of themselves on this machine: names of records -> the lines of their ``describe``."""
        tellers: dict[str, list[Record]] = {}
        for records in self._collection.records.values():
            for record in records.values():
                if record.describe:
                    tellers.setdefault(record.describe, []).append(record)
        return {
            ", ".join(dict.fromkeys(record.name for record in records)): description(records[0])
            for records in tellers.values()
        }

    def attention_backends(self) -> list[AttentionBackendRecord]:
        """All of them, in the order of preference: priority down, then name."""
        return _by_priority(self._all("kvpage_attention_backends", AttentionBackendRecord))

    def decoder_backends(self) -> list[DecoderBackendRecord]:
        """All of them, in the order of preference: priority down, then name."""
        return _by_priority(self._all("kvpage_decoder_backends", DecoderBackendRecord))

    def linear_kernels(self) -> list[LinearKernelRecord]:
        """All of them, in the order of preference: priority down, then name."""
        return _by_priority(self._all("kvpage_linear_kernels", LinearKernelRecord))

    def sampling_kernels(self) -> list[SamplingKernelRecord]:
        """All of them, in the order of preference: priority down, then name."""
        return _by_priority(self._all("kvpage_sampling_kernels", SamplingKernelRecord))

    def checkpoint_readers(self) -> list[CheckpointReaderRecord]:
        """All of them, in the order of registration, in which they are asked."""
        return self._all("kvpage_checkpoint_readers", CheckpointReaderRecord)

    def quantization_schemes(self) -> list[QuantizationSchemeRecord]:
        """All of them, in the order of registration."""
        return self._all("kvpage_quantization_schemes", QuantizationSchemeRecord)

    def models(self) -> list[ModelRecord]:
        """All families, in the order of registration."""
        return self._all("kvpage_models", ModelRecord)

    def logits_processors(self) -> list[LogitsProcessorRecord]:
        """All of them, in the order of registration, in which they run."""
        return self._all("kvpage_logits_processors", LogitsProcessorRecord)

    def proposers(self) -> list[ProposerRecord]:
        """All of them, in the order of registration."""
        return self._all("kvpage_proposers", ProposerRecord)

    def scheduling_policies(self) -> list[SchedulingPolicyRecord]:
        """All of them, in the order of registration."""
        return self._all("kvpage_scheduling_policies", SchedulingPolicyRecord)

    def kv_connectors(self) -> list[KVConnectorRecord]:
        """All of them, in the order of registration."""
        return self._all("kvpage_kv_connectors", KVConnectorRecord)

    def event_listeners(self) -> list[EventListenerRecord]:
        """All of them, in the order of registration, in which they hear."""
        return self._all("kvpage_event_listeners", EventListenerRecord)

    def cli_commands(self) -> list[CliCommandRecord]:
        """All of them, in the order of registration."""
        return self._all("kvpage_cli_commands", CliCommandRecord)

    def model_for(self, architectures: Sequence[str]) -> ModelRecord:
        """The family that translates the first known one of a config's ``architectures``.

        Raises:
            CheckpointError: none is known; the message lists the families that there are.
        """
        by_architecture = {name: record for record in self.models() for name in record.architectures}
        for name in architectures:
            if name in by_architecture:
                return by_architecture[name]
        asked = (
            f"architecture {', '.join(architectures)}"
            if architectures
            else "a config without 'architectures'"
        )
        raise CheckpointError(
            f"{asked} is not supported by a model family; a plugin can add one through the hook kvpage_models. There "
            f"are: {', '.join(sorted({record.name for record in by_architecture.values()}))}"
        )

    def find_family(self, architectures: Sequence[str]) -> tuple[str, Callable[..., object]]:
        """(name of the family for ``architectures``, what translates a config).

        Raises:
            CheckpointError: as ``model_for``.
            PluginError: it cannot be imported, or is no function.
        """
        record = self.model_for(architectures)
        translate = load(record)
        if not callable(translate):
            raise PluginError(
                f"model family {record.name!r}: {record.factory} is {translate!r:.80}, no function"
            )
        return record.name, translate

    def select_attention_backend(
        self, need: AttentionNeed, explicit: str | None = None, trial: Trial | None = None
    ) -> BackendChoice:
        """The backend named, or an error; else the one that a plugin's ``kvpage_select_attention_backend`` takes of
        those that can serve ``need``; else the first of them, in order of preference.

        Args:
            trial: makes a backend as the engine will, and raises PluginError where that fails; such a one is
                passed over.

        Raises:
            ConfigError: the named backend is unknown or lacks something, or no backend is left.
            PluginError: the named backend is defective.
        """
        asked = any(SELECT in member.hooks for member in self._collection.members)
        return choose_attention(
            self.attention_backends(), need, explicit, self._opinion if asked else None, trial
        )

    def select_decoder(
        self,
        need: AttentionNeed,
        spec: DecoderSpec,
        env: DecoderEnv,
        *,
        decoder_backend: str | None = None,
        attention_backend: str | None = None,
        trial: Trial | None = None,
    ) -> DecoderChoice:
        """A decoder backend for ``spec`` together with the attention backend that it works with.

        Raises:
            ConfigError: a named backend is unknown or cannot serve, or no attention backend is left.
            PluginError: a named backend is defective.
        """
        return choose_decoder(
            self.decoder_backends(),
            lambda name: self.select_attention_backend(need, name, trial),
            spec,
            env,
            explicit=decoder_backend,
            attention=attention_backend,
        )

    def _opinion(self, need: AttentionNeed, candidates: Sequence[str]) -> tuple[str | None, str, list[str]]:
        """The first plugin's answer that can be followed: (answer, plugin, what was ignored)."""
        ignored: list[str] = []
        values = {"need": need, "candidates": candidates}
        for member in self._collection.members:
            for implementation in member.hooks.get(SELECT, ()):
                try:
                    answer = implementation.function(*[values[name] for name in implementation.argnames])
                    if answer is None:
                        continue
                    if isinstance(answer, str) and answer in candidates:
                        return answer, member.name, ignored
                    problem = f"answered {answer!r:.80}, which is none of {', '.join(candidates)}"
                except BROKEN as error:
                    problem = f"raised {describe(error)}"
                ignored.append(f"plugin {member.name!r}: {SELECT} {problem}: ignored")
        return None, "", ignored

    def _all(self, hook: str, kind: type[R]) -> list[R]:
        return cast("list[R]", list(self._collection.records.get(hook, {}).values()))


def _by_priority(records: list[Prioritized]) -> list[Prioritized]:
    return sorted(records, key=lambda record: (-record.priority, record.name))
