"""``kvpage plugins list|explain|check``: what was found, what is chosen and why, and does it compute right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from kvpage.api.records import AttentionBackendRecord, CliCommandRecord, ModelRecord, Record
from kvpage.cli.engine_flags import add_engine_flags, add_model_argument, chosen_model, engine_options
from kvpage.cli.main import NO, OK
from kvpage.cli.parser import CommandParser, UsageError
from kvpage.cli.signals import undivided
from kvpage.config import EngineOptions, resolve_dtype
from kvpage.errors import PluginError
from kvpage.plugins import PluginRegistry, load

LIST = "Every plugin that was found, with what it registers; one that could not be used, with the reason."
EXPLAIN = "Which attention backend an engine with these flags would choose, and why not the others."
CHECK = """\
Compare each attention backend, or the named one, with attention computed directly in float64 on this machine.
Exit status: 0 all agree, 1 one does not."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    actions: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "list": (list_plugins, LIST), "explain": (explain, EXPLAIN), "check": (check, CHECK),
    }  # fmt: skip
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: kvpage plugins {{{','.join(actions)}}} [FLAGS]\n")
        print("\n".join(f"{name:<8} {' '.join(text.split())}" for name, (_, text) in actions.items()))
        return OK
    name = arguments[0] if arguments else "list"
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
        records = [
            {
                **asdict(status),
                "records": [{"kind": _kind(record), **asdict(record)} for record in status.records],
            }
            for status in statuses
        ]
        print(json.dumps(records, indent=2))
        return OK
    for status in statuses:
        version = f" {status.version}" if status.version else ""
        print(
            f"{status.name} ({status.origin}{version}): {status.status}{': ' + status.reason if status.reason else ''}"
        )
        for record in status.records:
            print(f"  {_kind(record):<18} {record.name:<14} {_details(record)}".rstrip())
    return OK


def explain(arguments: Sequence[str]) -> int:
    """``kvpage plugins explain``."""
    parser = CommandParser("kvpage plugins explain", EXPLAIN, "[MODEL]")
    add_model_argument(parser)
    add_engine_flags(parser)
    namespace = parser.parse_arguments(arguments)
    options = EngineOptions(model=chosen_model(namespace), **engine_options(namespace))

    with undivided():
        from kvpage.engine.backends import attention_need  # torch, as the backends themselves
    from kvpage.inspect.checkpoint import planned_model

    registry = PluginRegistry()
    model = planned_model(options, registry)
    device = "cpu" if options.device == "auto" else options.device
    need = attention_need(options, model.spec, device, resolve_dtype(options, model.dtype))
    features = ", ".join(sorted(need.features)) or "none"
    dims = ", ".join(str(size) for size in sorted(need.head_dims))
    print(
        f"{model.name} needs: device {need.device}, {need.dtype}, KV in {need.kv_dtype}, head dim {dims}, "
        f"block size {need.block_size or 'any'}, features: {features}"
    )
    choice = registry.select_attention_backend(need, options.attention_backend)
    print(choice.explain())
    print(f"block size {choice.block_size}")
    return OK


def check(arguments: Sequence[str]) -> int:
    """``kvpage plugins check``."""
    parser = CommandParser("kvpage plugins check", CHECK, "[BACKEND]")
    parser.add_argument("backend", nargs="?", metavar="BACKEND", help="name of an attention backend [all]")
    parser.add_argument("--device", default="cpu", help="torch device [cpu]")
    namespace = parser.parse_arguments(arguments)
    records = PluginRegistry().attention_backends()
    if namespace.backend:
        known = ", ".join(record.name for record in records)
        records = [record for record in records if record.name == namespace.backend]
        if not records:
            raise PluginError(f"there is no attention backend {namespace.backend!r}; known: {known}")
    agreed = [_check_one(record, namespace.device) for record in records]
    return OK if all(agreed) else NO


def _check_one(record: AttentionBackendRecord, device: str) -> bool:
    with undivided():
        from kvpage.testing.attention import short_check  # torch

    try:
        backend = load(record)
    except PluginError as error:
        print(f"{record.name}: cannot be loaded: {error}")
        return False
    if device.partition(":")[0] not in backend.caps.devices:
        print(f"{record.name}: not for {device} (has {', '.join(sorted(backend.caps.devices))})")
        return True
    passed = True
    for result in short_check(backend, device):
        print(f"{record.name}: {result.case}: {result.verdict}" + (f": {result.finding}" if result.finding else ""))
        passed = passed and result.passed
    return passed


def _kind(record: Record) -> str:
    """ "AttentionBackendRecord" -> "attention backend"."""
    return "".join(_words(type(record).__name__.removesuffix("Record"))).strip()


def _words(name: str) -> Iterator[str]:
    for letter in name:
        yield f" {letter.lower()}" if letter.isupper() else letter


def _details(record: Record) -> str:
    if isinstance(record, AttentionBackendRecord):
        return f"priority {record.priority}: {record.summary}"
    if isinstance(record, ModelRecord):
        return ", ".join(record.architectures)
    return record.help if isinstance(record, CliCommandRecord) else ""
