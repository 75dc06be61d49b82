"""Hooks that plugins add for others: there before any plugin is checked, gone with the plugin that added them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from installed_plugins import module, policy_plugin
from kvpage import PluginError, PluginRegistry
from kvpage.api.records import Record


@dataclass(frozen=True, kw_only=True)
class RouteRecord(Record):
    """A record of a plugin's own kind."""

    path: str = "/"


OFFERS = """
@hookimpl
def kvpage_addhooks():
    return [HookRecord(name="kvpage_server_routes", factory="{factory}", needs={needs}, summary="routes of the server")]
"""
IMPLEMENTS = """
from test_added_hooks import RouteRecord
@hookimpl
def kvpage_server_routes():
    return [RouteRecord(name="{name}", factory="a:b", path="/x")]
"""
HOOK = "kvpage_server_routes"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module by the name that the plugins use."""
    monkeypatch.setitem(sys.modules, "test_added_hooks", sys.modules[__name__])


def offers(
    factory: str = "test_added_hooks:RouteRecord", needs: tuple[str, ...] = (), more: str = ""
) -> object:
    return module(OFFERS.format(factory=factory, needs=needs) + more, "server")


def implements(name: str = "metrics", more: str = "") -> object:
    return module(IMPLEMENTS.format(name=name) + more, name)


def reasons(made: PluginRegistry) -> dict[str, str]:
    return {status.name: status.reason for status in made.statuses() if status.status == "failed"}


def test_a_plugin_may_implement_a_hook_that_a_later_one_adds() -> None:
    made = PluginRegistry(
        plugins=[implements("early"), offers(), implements("late")], entry_points=False, strict=True
    )
    assert [record.name for record in made.records(HOOK)] == ["early", "late"]
    assert all(isinstance(record, RouteRecord) for record in made.records(HOOK))


def test_a_hook_that_nobody_implements_has_no_records_and_one_that_is_nowhere_is_an_error() -> None:
    assert PluginRegistry(plugins=[offers()], entry_points=False, strict=True).records(HOOK) == []
    with pytest.raises(PluginError, match="kvpage_server_routes is no hook"):
        PluginRegistry(entry_points=False).records(HOOK)
    with pytest.raises(PluginError, match=r"did you mean kvpage_models\?"):
        PluginRegistry(entry_points=False).records("kvpage_model")


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (lambda: offers("nowhere:RouteRecord"), "nowhere:RouteRecord cannot be imported"),
        (lambda: offers("json:JSONDecoder"), "is no subclass of kvpage.api.records.Record"),
        (lambda: offers(more=policy_plugin("fcfs")), "'fcfs' is already registered"),
        (lambda: offers(more="@hookimpl\ndef kvpage_model(): return []"), "did you mean kvpage_models?"),
    ],
)
def test_a_broken_owner_takes_only_those_with_it_that_need_its_hook(plugin: object, reason: str) -> None:
    owner = plugin()  # type: ignore[operator]
    bystander = module(policy_plugin("fine"), "bystander")
    made = PluginRegistry(
        plugins=[implements("first"), bystander, owner, implements("last")], entry_points=False
    )
    failed = reasons(made)
    assert set(failed) == {"first", "server", "last"}
    assert reason in failed["server"]
    for name in ("first", "last"):
        assert (
            "kvpage_server_routes is a hook of 'server' (given to PluginRegistry), which failed"
            in failed[name]
        )
        assert reason in failed[name]
    assert "fine" in [record.name for record in made.scheduling_policies()]
    with pytest.raises(PluginError, match="which failed"):
        made.records(HOOK)


def test_failing_is_passed_on_through_several_owners() -> None:
    second = module(
        IMPLEMENTS.format(name="second") + "@hookimpl\ndef kvpage_addhooks():\n"
        "    return [HookRecord(name='kvpage_pages', factory='test_added_hooks:RouteRecord')]\n",
        "second",
    )
    third = module("@hookimpl\ndef kvpage_pages(): return []", "third")
    broken = offers(more="@hookimpl\ndef kvpage_model(): return []")
    made = PluginRegistry(plugins=[third, second, broken], entry_points=False)
    assert set(reasons(made)) == {"third", "second", "server"}
    assert "did you mean kvpage_models?" in reasons(made)["third"]


@pytest.mark.parametrize(
    "name", ["kvpage_models", "kvpage_select_attention_backend", HOOK, "routes", "kvpage_a-b"]
)
def test_a_hook_that_is_there_already_or_has_no_proper_name_fails_the_plugin_that_adds_it(name: str) -> None:
    source = OFFERS.replace("kvpage_server_routes", name).format(
        factory="test_added_hooks:RouteRecord", needs=()
    )
    made = PluginRegistry(plugins=[offers(), module(source, "other")], entry_points=False)
    assert set(reasons(made)) == {"other"}
    assert name in reasons(made)["other"]


def test_a_hook_whose_own_modules_are_absent_is_explained_to_those_who_implement_it() -> None:
    made = PluginRegistry(plugins=[implements(), offers(needs=("no_such_module",))], entry_points=False)
    assert set(reasons(made)) == {"metrics"}
    assert "needs no_such_module, which is not installed" in reasons(made)["metrics"]


def test_an_optional_implementation_may_do_without_the_hook() -> None:
    source = policy_plugin("fine") + "@hookimpl(optionalhook=True)\ndef kvpage_server_routes(): return []"
    assert reasons(PluginRegistry(plugins=[module(source)], entry_points=False)) == {}


def test_records_of_an_added_hook_are_of_its_class_and_have_names_of_their_own() -> None:
    wrong = module(
        "@hookimpl\ndef kvpage_server_routes(): return [ProposerRecord(name='p', factory='a:b')]", "wrong"
    )
    argument = module("@hookimpl\ndef kvpage_server_routes(app): return []", "argument")
    again = module(IMPLEMENTS.format(name="metrics"), "again")
    made = PluginRegistry(plugins=[offers(), implements(), again, wrong, argument], entry_points=False)
    assert "which is no RouteRecord" in reasons(made)["wrong"]
    assert "takes no arguments, found app" in reasons(made)["argument"]
    assert "RouteRecord 'metrics' is already registered by 'metrics'" in reasons(made)["again"]
