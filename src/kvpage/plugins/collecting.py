"""Calling hooks plugin by plugin: what each registers, checked, and what to do about those that break a rule."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pluggy

from kvpage import hookspecs
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    CliCommandRecord,
    DecoderBackendRecord,
    EventListenerRecord,
    HookRecord,
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
from kvpage.errors import PluginError
from kvpage.plugins.discovery import BROKEN, Found
from kvpage.plugins.factories import load, unavailable

HOOKS: Mapping[str, type[Record]] = {
    "kvpage_attention_backends": AttentionBackendRecord,
    "kvpage_decoder_backends": DecoderBackendRecord,
    "kvpage_checkpoint_readers": CheckpointReaderRecord,
    "kvpage_quantization_schemes": QuantizationSchemeRecord,
    "kvpage_linear_kernels": LinearKernelRecord,
    "kvpage_sampling_kernels": SamplingKernelRecord,
    "kvpage_models": ModelRecord,
    "kvpage_logits_processors": LogitsProcessorRecord,
    "kvpage_proposers": ProposerRecord,
    "kvpage_scheduling_policies": SchedulingPolicyRecord,
    "kvpage_kv_connectors": KVConnectorRecord,
    "kvpage_event_listeners": EventListenerRecord,
    "kvpage_cli_commands": CliCommandRecord,
    "kvpage_addhooks": HookRecord,
}
"""The hooks of kvpage that register, and what their implementations return."""
SELECT = "kvpage_select_attention_backend"
PREFIX = "kvpage_"


class Member:
    """One plugin, registered with a manager of its own: nothing it does there reaches another plugin.

    Raises:
        PluginError: a hook asks for an argument that its specification lacks.
        Exception: whatever looking at the plugin's attributes raises.
    """

    def __init__(self, found: Found) -> None:
        assert found.plugin is not None
        self.found = found
        self.name = found.status.name
        self.plugin = found.plugin
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        try:
            manager.register(self.plugin, name=self.name)
        except pluggy.PluginValidationError as error:
            raise PluginError(" ".join(str(error).split())) from error
        self.hooks: dict[str, list[pluggy.HookImpl]] = {
            caller.name: caller.get_hookimpls() for caller in manager.get_hookcallers(self.plugin) or ()
        }
        self._answers: dict[str, list[Record]] = {}

    def records(self, hook: str, kind: type[Record]) -> list[Record]:
        """What its implementations of ``hook`` return; each is called once, however often this is asked.

        Raises:
            PluginError: something else than records of ``kind``.
            Exception: whatever an implementation raises.
        """
        if hook not in self._answers:
            self._answers[hook] = [
                record
                for implementation in self.hooks.get(hook, ())
                for record in _records(hook, kind, implementation.function())
            ]
        return self._answers[hook]


@dataclass(frozen=True, slots=True)
class AddedHook:
    """A hook that ``owner`` adds for others."""

    owner: Member
    record: HookRecord


class Collection:
    """The records of all plugins that keep the rules; the others are marked as failed, with the reason.

    Attributes:
        members: the plugins that are active, in order.
        records: hook -> name -> record.
        added: hooks that plugins added. lost: hooks that are not there any more -> why.
    """

    def __init__(self, found: Iterable[Found]) -> None:
        self.members: list[Member] = []
        self.records: dict[str, dict[str, Record]] = {}
        self.added: dict[str, AddedHook] = {}
        self.lost: dict[str, str] = {}
        for entry in found:
            if entry.plugin is not None:
                self._enter(entry)
        for member in list(self.members):
            self._attempt(member, self._add_hooks)
        # A plugin that fails takes the hooks that it added with it, and with these whoever implements them.
        while not all([self._attempt(member, self._settle_kinds) for member in list(self.members)]):
            pass
        while not self._take_all():
            pass
        for member in self.members:
            member.found.status.records = [
                r for hook in (*HOOKS, *self.added) for r in member.records(hook, Record)
            ]

    def kind(self, hook: str) -> type[Record]:
        """The class of a hook's records.

        Raises:
            PluginError: the class that an added hook names cannot be imported, or is no record.
        """
        if hook in HOOKS:
            return HOOKS[hook]
        record = self.added[hook].record
        found = load(record)
        if not (isinstance(found, type) and issubclass(found, Record)):
            raise PluginError(
                f"{record.factory} of the hook {hook} is no subclass of kvpage.api.records.Record"
            )
        return found

    def known_hooks(self) -> list[str]:
        """Every hook there is to implement."""
        return [*HOOKS, SELECT, *self.added]

    def _enter(self, entry: Found) -> None:
        try:
            for member in self.members:
                if member.plugin is entry.plugin:
                    raise PluginError(f"it is the same plugin as {_place(member)}")
            self.members.append(Member(entry))
        except BROKEN as error:
            entry.fail(error)

    def _attempt(self, member: Member, step: Callable[[Member], None]) -> bool:
        """``step``, or the member and its hooks leave. Whether all hooks are still there."""
        if member not in self.members:
            return True
        try:
            step(member)
        except BROKEN as error:
            self.members.remove(member)
            member.found.fail(error)
            gone = [hook for hook, added in self.added.items() if added.owner is member]
            for hook in gone:
                self._lose(hook, f"which failed: {member.found.status.reason}")
            return not gone
        return True

    def _lose(self, hook: str, reason: str) -> None:
        self.lost[hook] = f"{hook} is a hook of {_place(self.added.pop(hook).owner)}, {reason}"

    def _add_hooks(self, member: Member) -> None:
        offered = [r for r in member.records("kvpage_addhooks", HookRecord) if isinstance(r, HookRecord)]
        own: dict[str, AddedHook] = {}
        for record in offered:
            name = record.name
            if not name.startswith(PREFIX) or not name.isidentifier():
                raise PluginError(
                    f"it adds the hook {name!r}: a hook's name is an identifier that begins with {PREFIX}"
                )
            taken = self.added.get(name) or own.get(name)
            if name in HOOKS or name == SELECT or taken is not None:
                owner = "kvpage itself" if taken is None else _place(taken.owner)
                raise PluginError(f"it adds the hook {name}, which {owner} already has: choose another name")
            own[name] = AddedHook(member, record)
        self.added.update(own)

    def _settle_kinds(self, member: Member) -> None:
        """The record classes of a member's added hooks, as far as anybody implements them."""
        for hook in [hook for hook, added in self.added.items() if added.owner is member]:
            needs = unavailable(self.added[hook].record)
            if needs:
                self._lose(hook, f"which is not usable: it {needs}")
            elif any(hook in other.hooks for other in self.members):
                self.kind(hook)

    def _take_all(self) -> bool:
        """Whether every hook that there was at the beginning is there at the end."""
        self.records = {}
        return all([self._attempt(member, self._take) for member in list(self.members)])

    def _take(self, member: Member) -> None:
        self._check_hooks(member)
        own = {
            hook: member.records(hook, self.kind(hook))
            for hook in (*HOOKS, *self.added)
            if hook in member.hooks
        }
        fresh: dict[str, dict[str, Record]] = {}
        for hook, records in own.items():
            taken = self.records.get(hook, {})
            for record in records:
                if record.name in taken or record.name in fresh.get(hook, {}):
                    raise PluginError(
                        self._repeated(hook, record, f"{type(record).__name__} {record.name!r}")
                    )
                fresh.setdefault(hook, {})[record.name] = record
        self._check_architectures(own.get("kvpage_models", ()))
        for hook, named in fresh.items():
            self.records.setdefault(hook, {}).update(named)

    def _repeated(self, hook: str, record: Record, what: str) -> str:
        owner = next(
            (m for m in self.members for r in m.records(hook, Record) if r.name == record.name), None
        )  # the first in order, which keeps the name
        return (
            f"{what} is already registered by {'it' if owner is None else _place(owner)}: "
            "rename one, or leave one plugin out"
        )

    def _check_architectures(self, records: Sequence[Record]) -> None:
        """One family an architecture, or it would depend on the order of plugins what a checkpoint means."""
        families: dict[str, ModelRecord] = {}
        for known in (*self.records.get("kvpage_models", {}).values(), *records):
            assert isinstance(known, ModelRecord)
            for name in known.architectures:
                if families.setdefault(name, known) is not known:
                    raise PluginError(
                        self._repeated(
                            "kvpage_models", families[name], f"the architecture {name!r} of {known.name!r}"
                        )
                    )

    def _check_hooks(self, member: Member) -> None:
        if not member.hooks:
            raise PluginError("it implements no hook of kvpage: mark its hooks with @kvpage.hookimpl")
        for hook, implementations in member.hooks.items():
            for implementation in implementations:
                if hook in self.added or hook in HOOKS or hook == SELECT:
                    self._check_implementation(hook, implementation)
                elif not implementation.optionalhook:
                    raise PluginError(self.lost.get(hook) or f"{hook} is no hook; {self.nearest(hook)}")
        for hook in self.known_hooks():
            if hook not in member.hooks and inspect.isroutine(
                inspect.getattr_static(member.plugin, hook, None)
            ):
                raise PluginError(f"{hook} is not marked with @kvpage.hookimpl")

    def _check_implementation(self, hook: str, implementation: pluggy.HookImpl) -> None:
        if implementation.wrapper or implementation.hookwrapper:
            raise PluginError(f"{hook} is a hook wrapper: hooks of kvpage only register")
        if hook in self.added and implementation.argnames:
            raise PluginError(f"{hook} takes no arguments, found {', '.join(implementation.argnames)}")

    def nearest(self, hook: str) -> str:
        """What was probably meant by a hook that there is not."""
        near = difflib.get_close_matches(hook, self.known_hooks(), n=1, cutoff=0.8)
        return f"did you mean {near[0]}?" if near else f"known are {', '.join(self.known_hooks())}"


def _records(hook: str, kind: type[Record], answer: object) -> list[Record]:
    if inspect.iscoroutine(answer):
        answer.close()
        raise PluginError(f"{hook} is an async function: it must return a list of {kind.__name__}")
    if isinstance(answer, str) or not isinstance(answer, Iterable):
        raise PluginError(f"{hook} returned {answer!r:.80}: it must return a list of {kind.__name__}")
    records = []
    for record in answer:
        if not isinstance(record, kind):
            raise PluginError(f"{hook} returned {record!r:.80}, which is no {kind.__name__}")
        records.append(record)
    return records


def _place(member: Member) -> str:
    return f"{member.name!r} ({member.found.status.origin})"
