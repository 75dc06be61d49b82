"""Whatever a plugin does wrong, it alone is left out, and the reason says what and how to go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from installed_plugins import module, policy_plugin
from kvpage import PluginError, PluginRegistry
from kvpage.api import API_VERSION
from kvpage.api.records import (
    AttentionBackendRecord,
    CheckpointReaderRecord,
    ModelRecord,
    QuantizationSchemeRecord,
    Record,
)
from kvpage.plugins import PluginStatus


def registry(*plugins: object, strict: bool = False) -> PluginRegistry:
    return PluginRegistry(plugins=plugins, entry_points=False, strict=strict)


def status_of(made: PluginRegistry, name: str) -> PluginStatus:
    return next(status for status in made.statuses() if status.name == name)


BROKEN = {
    "a misspelt hook": (
        "@hookimpl\ndef kvpage_attention_backend(): return []",
        "kvpage_attention_backend is no hook; did you mean kvpage_attention_backends?",
    ),
    "an unknown argument": ("@hookimpl\ndef kvpage_models(config): return []", "'config'"),
    "an argument by keyword only": ("@hookimpl\ndef kvpage_models(*, config): return []", "TypeError"),
    "nothing": ("@hookimpl\ndef kvpage_models(): pass", "kvpage_models returned None: it must return a list"),
    "text": ("@hookimpl\ndef kvpage_models(): return 'llama'", "returned 'llama'"),
    "one record, no list": (
        "@hookimpl\ndef kvpage_models(): return ModelRecord(name='m', factory='a:b', architectures=('A',))",
        "must return a list of ModelRecord",
    ),
    "a record of another hook": (
        "@hookimpl\ndef kvpage_models(): return [LogitsProcessorRecord(name='p', factory='a:b')]",
        "which is no ModelRecord",
    ),
    "an exception": ("@hookimpl\ndef kvpage_models(): raise KeyError('k')", "KeyError: 'k'"),
    "the end of the process": ("@hookimpl\ndef kvpage_models(): raise SystemExit(3)", "SystemExit: 3"),
    "a coroutine": ("@hookimpl\nasync def kvpage_models(): return []", "kvpage_models is an async function"),
    "a wrapper": ("@hookimpl(wrapper=True)\ndef kvpage_models():\n    return (yield)", "hook wrapper"),
    "no mark": (
        "def kvpage_models(): return []\n" + policy_plugin("unmarked"),
        "kvpage_models is not marked with @kvpage.hookimpl",
    ),
    "no hook": ("VALUE = 1", "implements no hook of kvpage"),
    "a name twice": (
        policy_plugin("one") + "@hookimpl(specname='kvpage_scheduling_policies')\ndef more():\n"
        "    return kvpage_scheduling_policies()",
        "'one' is already registered by",
    ),
    "a name of the builtin plugin": (policy_plugin("fcfs"), "'fcfs' is already registered by 'builtin' (kvpage)"),
    "an architecture of the builtin plugin": (
        "@hookimpl\ndef kvpage_models():\n"
        "    return [ModelRecord(name='mine', factory='a:b', architectures=('LlamaForCausalLM',))]",
        "the architecture 'LlamaForCausalLM'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_listed_and_the_next_one_is_used(what: str) -> None:
    source, reason = BROKEN[what]
    # A record of its own must not stay behind.
    broken = module(
        "@hookimpl\ndef kvpage_proposers():\n    yield ProposerRecord(name='left', factory='a:b')\n" + source
    )
    if what == "no hook":
        broken = module(source)
    made = registry(broken, module(policy_plugin("fine"), "fine"))
    status = status_of(made, "made_of_text")
    assert status.status == "failed"
    assert reason in status.reason
    assert status.records == made.proposers() == []
    assert [record.name for record in made.scheduling_policies()] == ["fcfs", "priority", "fine"]
    with pytest.raises(PluginError, match="made_of_text"):
        registry(broken, strict=True)


def test_records_may_come_from_any_iterable() -> None:
    source = (
        "@hookimpl\ndef kvpage_proposers():\n    yield ProposerRecord(name='a', factory='a:b')\n"
        "@hookimpl\ndef kvpage_kv_connectors(): return {KVConnectorRecord(name='b', factory='a:b')}"
    )
    made = registry(module(source), strict=True)
    assert [record.name for record in [*made.proposers(), *made.kv_connectors()]] == ["a", "b"]


def test_each_hook_is_called_once() -> None:
    source = "calls = []\n@hookimpl\ndef kvpage_proposers():\n    calls.append(1)\n    return []"
    counting = module(source)
    registry(counting, module("@hookimpl\ndef kvpage_model(): return []", "broken")).proposers()
    assert counting.calls == [1]


def test_of_two_plugins_with_one_name_of_a_record_the_later_fails_and_both_are_named() -> None:
    made = registry(module(policy_plugin("same"), "first"), module(policy_plugin("same"), "second"))
    assert status_of(made, "first").status == "active"
    assert "'same' is already registered by 'first'" in status_of(made, "second").reason


def test_objects_of_one_class_are_told_apart_and_the_same_module_is_not_taken_twice() -> None:
    class Plugin:
        def __init__(self, name: str) -> None:
            self.kvpage_scheduling_policies = module(policy_plugin(name)).kvpage_scheduling_policies

    twice = module(policy_plugin("twice"), "twice")
    made = registry(Plugin("a"), Plugin("b"), twice, twice)
    assert [(s.name, s.status) for s in made.statuses()][1:] == [
        ("Plugin", "active"), ("Plugin-2", "active"), ("twice", "active"), ("twice", "failed"),
    ]  # fmt: skip
    assert "the same plugin as 'twice'" in made.statuses()[-1].reason


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("'1.2'", f"stated needs kvpage api 1.2, this is {API_VERSION}: pip install -U kvpage"),
        ("'2.0'", "pip install -U kvpage"),
        ("'0.9'", "install a newer version of the plugin"),
        ("1.0", "KVPAGE_API_VERSION = 1.0: it must be text"),
        ("'1'", "must be text of two numbers"),
        ("'1.0.dev1'", "must be text of two numbers"),
    ],
)
def test_a_plugin_for_another_api_is_refused(stated: str, reason: str) -> None:
    made = registry(module(f"KVPAGE_API_VERSION = {stated}\n" + policy_plugin("p"), "stated"))
    assert reason in status_of(made, "stated").reason
    assert [record.name for record in made.scheduling_policies()] == ["fcfs", "priority"]


def test_a_plugin_that_states_this_api_is_listed_with_it() -> None:
    made = registry(module(f"KVPAGE_API_VERSION = {API_VERSION!r}\n" + policy_plugin("p")), strict=True)
    assert status_of(made, "made_of_text").api_version == API_VERSION


class Exploding:
    """Looking at it raises."""

    @property
    def KVPAGE_API_VERSION(self) -> str:
        raise OSError("no device")


def test_a_plugin_that_cannot_even_be_looked_at_is_listed() -> None:
    reason = status_of(registry(Exploding()), "Exploding").reason
    assert reason.startswith("OSError: no device, at ")


def test_a_reason_is_one_line_and_says_where_the_plugin_raised() -> None:
    broken = module("@hookimpl\ndef kvpage_models():\n    raise OSError('driver too\\nold')")
    reason = status_of(registry(broken), "made_of_text").reason
    assert re.fullmatch(r"OSError: driver too \.\.\., at \S+:\d+", reason)


@pytest.mark.parametrize("given", [None, 42, {"a": 1}, [("builtin",)]])
def test_only_what_resolved_gave_is_loaded_again(given: Any) -> None:
    with pytest.raises(PluginError, match=r"from_resolved takes what resolved\(\) gave"):
        PluginRegistry.from_resolved(given)


@pytest.mark.parametrize("option", [{"strict": "yes"}, {"entry_points": "no"}, {"selection": 3}])
def test_an_option_of_another_type_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=f"{next(iter(option))} must be"):
        PluginRegistry(**option)


def test_a_hook_is_named_by_text() -> None:
    with pytest.raises(PluginError, match="a hook is named by text"):
        registry().records(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ModelRecord(name="m", factory="a:b", architectures=()), "architectures=()"),
        (lambda: ModelRecord(name="m", factory="a:b", architectures=("",)), "architectures=('',)"),
        (lambda: CheckpointReaderRecord(name="m", factory="a:b", files=()), "files=()"),
        (lambda: QuantizationSchemeRecord(name="m", factory="a:b", bits=0), "bits=0"),
        (lambda: QuantizationSchemeRecord(name="m", factory="a:b", bits=float("nan")), "bits=nan"),
    ],
)
def test_a_record_that_could_never_be_chosen_is_refused(make: Callable[[], Record], reason: str) -> None:
    with pytest.raises(PluginError, match=re.escape(f"'m' has {reason}: ")):
        make()


@pytest.mark.parametrize("given", ["kvpage_mychip.plugin", 3, pytest])
def test_plugins_must_be_a_list(given: Any) -> None:
    with pytest.raises(PluginError, match="must be a list of modules or objects"):
        PluginRegistry(plugins=given, entry_points=False)


@pytest.mark.parametrize("given", [None, "kvpage_mychip.plugin"])
def test_what_is_no_plugin_is_listed(given: object) -> None:
    assert "is no plugin: give a module" in registry(given).statuses()[1].reason


def test_a_record_with_a_field_of_another_type_is_refused_where_it_is_made() -> None:
    with pytest.raises(PluginError, match="'fast' has priority='high': it must be int"):
        AttentionBackendRecord(name="fast", factory="a:b", priority="high")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="architectures='LlamaForCausalLM'"):
        ModelRecord(name="mine", factory="a:b", architectures="LlamaForCausalLM")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="files="):
        CheckpointReaderRecord(name="mine", factory="a:b", files=(1,))  # type: ignore[arg-type]
