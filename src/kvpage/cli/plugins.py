"""``kvpage plugins list|explain|check``: what was found, what is chosen and why, and does it compute right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from kvpage.api.attention import AttentionBackend
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    CliCommandRecord,
    HookRecord,
    ModelRecord,
    QuantizationSchemeRecord,
    Record,
)
from kvpage.cli.main import NO, OK
from kvpage.cli.plugins_explain import EXPLAIN, explain
from kvpage.cli.signals import undivided
from kvpage.errors import PluginError
from kvpage.flags.parser import CommandParser, UsageError
from kvpage.plugins import PluginRegistry, PluginStatus
from kvpage.plugins.collecting import HOOKS
from kvpage.plugins.factories import lacking, load_class

LIST = "Every plugin that was found, with what it registers; one that could not be used, with the reason."
CHECK = """\
Put each attention backend, or those of NAME, a backend or a plugin, through a short pass of the conformance suite on
this machine. Exit status: 0 all pass, 1 one does not, or the plugin named was not loaded."""


def _singular(hook: str) -> str:
    """ "kvpage_attention_backends" -> "attention backend"."""
    words = hook.removeprefix("kvpage_").replace("_", " ")
    return words.removesuffix("ies") + "y" if words.endswith("ies") else words.removesuffix("s")


KINDS = {kind: _singular(hook) for hook, kind in HOOKS.items()} | {HookRecord: "hook"}
"""Record class -> what one is called: "attention backend"."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    actions: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "list": (list_plugins, LIST), "explain": (explain, EXPLAIN), "check": (check, CHECK),
    }  # fmt: skip
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: kvpage plugins {{{','.join(actions)}}} [FLAGS]\n")
        print("\n".join(f"{name:<8} {' '.join(text.split())}" for name, (_, text) in actions.items()))
        return OK
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in actions):
        return list_plugins(arguments)
    name = arguments[0]
    if name not in actions:
        raise UsageError(f"kvpage plugins: there is no {name!r}: use {', '.join(actions)}")
    return actions[name][0](arguments[1:])


def list_plugins(arguments: Sequence[str]) -> int:
    """``kvpage plugins list``."""
    parser = CommandParser("kvpage plugins list", LIST)
    parser.add_argument("--json", action="store_true", help="as JSON")
    namespace = parser.parse_arguments(arguments)
    statuses = PluginRegistry().statuses()
    if namespace.json:
        print(json.dumps([_as_json(status) for status in statuses], indent=2))
        return OK
    for status in statuses:
        print(_headline(status))
        for record in status.records:
            print(f"  {_kind(record):<19} {record.name:<14} {_details(record)}".rstrip())
            if lacking(record):
                print(f"  {'':<19} {'':<14} {lacking(record)}")
    return OK


def check(arguments: Sequence[str]) -> int:
    """``kvpage plugins check``."""
    parser = CommandParser("kvpage plugins check", CHECK, "[NAME]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of an attention backend or a plugin [all]")
    parser.add_argument("--device", default="cpu", help="torch device [cpu]")
    namespace = parser.parse_arguments(arguments)
    registry = PluginRegistry()
    records, status = _named(registry, namespace.name)
    if status is not None and status.status != "active":
        print(_headline(status))
        return NO
    if not records:
        print(f"{namespace.name}: it is active, and has no attention backend to check")
        return OK
    agreed = [_check_one(record, namespace.device) for record in records]
    return OK if all(agreed) else NO


def _named(
    registry: PluginRegistry, name: str | None
) -> tuple[list[AttentionBackendRecord], PluginStatus | None]:
    """(the attention backends that ``name`` means, the plugin of that name if it means one)."""
    records = registry.attention_backends()
    if name is None:
        return records, None
    chosen = [record for record in records if record.name == name]
    if chosen:
        return chosen, None
    # Of several plugins with one name, at most one is active.
    statuses = sorted((s for s in registry.statuses() if s.name == name), key=lambda s: s.status != "active")
    if not statuses:
        backends = ", ".join(record.name for record in records)
        plugins = ", ".join(dict.fromkeys(status.name for status in registry.statuses()))
        raise PluginError(
            f"there is no attention backend and no plugin {name!r}; known attention backends: {backends}; known "
            f"plugins: {plugins}"
        )
    return [record for record in records if record in statuses[0].records], statuses[0]


def _check_one(record: AttentionBackendRecord, device: str) -> bool:
    with undivided():
        from kvpage.testing.attention import short_check  # torch

    try:
        backend: type[AttentionBackend] = load_class(record, AttentionBackend)
        devices = backend.caps.devices
    except Exception as error:  # caps are foreign code
        print(f"{record.name}: cannot be loaded: {error}")
        return False
    if device.partition(":")[0] not in devices:
        print(f"{record.name}: not for {device} (has {', '.join(sorted(devices))})")
        return True
    passed = True
    for result in short_check(backend, device):
        print(
            f"{record.name}: {result.case}: {result.verdict}"
            + (f": {result.finding}" if result.finding else "")
        )
        passed = passed and result.passed
    print(f"{record.name}: {'pass' if passed else 'FAIL'}")
    return passed


def _headline(status: PluginStatus) -> str:
    version = f" {status.version}" if status.version else ""
    api = f", kvpage api {status.api_version}" if status.api_version else ""
    reason = f": {status.reason}" if status.reason else ""
    return f"{status.name} ({status.origin}{version}{api}): {status.status}{reason}"


def _as_json(status: PluginStatus) -> dict[str, object]:
    records = [
        {"kind": _kind(record), **asdict(record), "unavailable": lacking(record)} for record in status.records
    ]
    return {**asdict(status), "records": records}


def _kind(record: Record) -> str:
    """ "attention backend"; a record of a plugin's own kind by its class."""
    return next((KINDS[kind] for kind in type(record).__mro__ if kind in KINDS), type(record).__name__)


def _details(record: Record) -> str:
    """What tells it from others of its kind."""
    parts = []
    if hasattr(record, "priority"):
        parts.append(f"priority {record.priority}")
    if isinstance(record, ModelRecord):
        parts.append(", ".join(record.architectures))
    if isinstance(record, CheckpointReaderRecord):
        parts.append(", ".join(record.files))
    if isinstance(record, QuantizationSchemeRecord) and record.methods:
        parts.append(f"reads {', '.join(record.methods)}")
    if isinstance(record, CliCommandRecord):
        parts.append(record.help)
    return ": ".join([*parts, *filter(None, [getattr(record, "summary", "")])])
