"""Plugins of installed distributions: found by metadata, left out or brought in by KVPAGE_PLUGINS."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpage
from installed_plugins import forget, install, policy_plugin
from kvpage import PluginError, PluginRegistry
from kvpage.plugins import PluginStatus

NAMES = ("alpha_plugin", "beta_plugin", "gamma_plugin", "loose_plugin")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on the import path."""
    monkeypatch.delenv("KVPAGE_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    forget(*NAMES)


@pytest.fixture
def three(site: Path) -> Path:
    """Distributions with the plugins alpha, beta and gamma, and a module loose_plugin that is none."""
    for name in ("gamma", "alpha", "beta"):
        install(site, f"kvpage-{name}", f"{name} = {name}_plugin", policy_plugin(name))
    (site / "loose_plugin.py").write_text(
        (site / "alpha_plugin.py").read_text(encoding="utf-8").replace("'alpha'", "'loose'"), encoding="utf-8"
    )
    return site


def statuses(made: PluginRegistry) -> dict[str, PluginStatus]:
    return {status.name: status for status in made.statuses()}


def active(made: PluginRegistry) -> list[str]:
    """Those of this file's own plugins; others may be installed where the tests run."""
    return [s.name for s in made.statuses() if s.status == "active" and (s.value in NAMES)]


def test_installed_plugins_come_by_name_with_their_distribution_and_version(three: Path) -> None:
    made = PluginRegistry()
    assert active(made) == ["alpha", "beta", "gamma"]
    alpha = statuses(made)["alpha"]
    assert (alpha.origin, alpha.version, alpha.value) == ("kvpage-alpha", "1.0", "alpha_plugin")
    assert active(PluginRegistry(entry_points=False)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["alpha", "beta", "gamma"]),
        ("-beta", ["alpha", "gamma"]),
        ("-alpha, -beta ,", ["gamma"]),
        ("-*,+beta", ["beta"]),
        ("+beta,-*", []),
        ("-beta,+beta", ["alpha", "beta", "gamma"]),
        ("+loose_plugin", ["alpha", "beta", "gamma", "loose_plugin"]),
        ("-*,+loose_plugin", ["loose_plugin"]),
        ("+loose_plugin,-loose_plugin", ["alpha", "beta", "gamma"]),
        ("+builtin", ["alpha", "beta", "gamma"]),
    ],
)
def test_a_selection_is_applied_from_left_to_right(
    three: Path, text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPAGE_PLUGINS", text)
    before = dict(os.environ)
    assert active(PluginRegistry(strict=True)) == expected
    monkeypatch.setenv("KVPAGE_PLUGINS", "-*")
    assert active(PluginRegistry(selection=text, strict=True)) == expected
    assert dict(os.environ) == {**before, "KVPAGE_PLUGINS": "-*"}


def test_a_plugin_left_out_is_listed_with_what_did_it_and_never_imported(three: Path) -> None:
    made = PluginRegistry(selection="-beta")
    assert (statuses(made)["beta"].status, statuses(made)["beta"].reason) == (
        "disabled",
        "left out by selection: -beta",
    )
    assert "beta_plugin" not in sys.modules


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("-delta", "there is no plugin 'delta' to leave out; installed: "),
        ("beta", "must begin with '-'"),
        ("-", "must begin with '-'"),
        ("+not a module", "is neither an installed plugin"),
        ("+no_such_module", "No module named 'no_such_module'"),
        ("-builtin", "the builtin plugin cannot be left out"),
    ],
)
def test_an_item_that_cannot_be_followed_is_listed_and_the_others_are(
    three: Path, item: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPAGE_PLUGINS", f"-alpha,{item}")
    made = PluginRegistry()
    assert active(made) == ["beta", "gamma"]
    (failed,) = [status for status in made.statuses() if status.origin == "KVPAGE_PLUGINS"]
    assert failed.status == "failed"
    assert reason in failed.reason
    with pytest.raises(PluginError, match="KVPAGE_PLUGINS"):
        PluginRegistry(strict=True)


def test_the_variable_is_not_read_without_entry_points(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGE_PLUGINS", "+no_such_module")
    assert [status.name for status in PluginRegistry(entry_points=False, strict=True).statuses()] == [
        "builtin"
    ]
    with pytest.raises(PluginError, match="drop one of the two"):
        PluginRegistry(entry_points=False, selection="-alpha")


def test_of_two_distributions_with_one_name_the_second_is_not_imported_and_both_are_named(site: Path) -> None:
    install(site, "kvpage-first", "same = alpha_plugin", policy_plugin("first"))
    install(site, "kvpage-second", "same = beta_plugin", policy_plugin("second"))
    first, second = [status for status in PluginRegistry().statuses() if status.name == "same"]
    assert (first.origin, first.status) == ("kvpage-first", "active")
    assert (second.origin, second.status) == ("kvpage-second", "failed")
    assert "kvpage-second" in second.reason
    assert "kvpage-first" in second.reason
    assert "beta_plugin" not in sys.modules


def test_a_distribution_cannot_take_the_name_of_the_builtin_plugin(site: Path) -> None:
    install(site, "kvpage-bold", "builtin = alpha_plugin", policy_plugin("bold"))
    made = PluginRegistry()
    assert [(s.origin, s.status) for s in made.statuses() if s.name == "builtin"] == [
        ("kvpage", "active"), ("kvpage-bold", "failed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("from kvpage.api.records import NotYetRecord", "it may need another kvpage than this one"),
        ("import kvpage.not_yet", "pip install -U kvpage"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_fails_at_import_is_listed(site: Path, source: str, reason: str) -> None:
    install(site, "kvpage-alpha", "alpha = alpha_plugin", source)
    install(site, "kvpage-beta", "beta = beta_plugin", policy_plugin("beta"))
    made = PluginRegistry()
    assert statuses(made)["alpha"].status == "failed"
    assert reason in statuses(made)["alpha"].reason
    assert active(made) == ["beta"]
    with pytest.raises(PluginError, match="kvpage-alpha"):
        PluginRegistry(strict=True)


@pytest.mark.parametrize(
    ("distribution", "entry", "reason"),
    [
        ("kvpage", "server = kvpage_no_server.plugin [server]", "needs pip install 'kvpage[server]'"),
        ("kvpage", "gpu = kvpage_no_gpu.plugin", "needs kvpage_no_gpu, which is not installed"),
        (
            "kvpage-alpha",
            "alpha = kvpage_no_alpha.plugin [driver]",
            "needs pip install 'kvpage-alpha[driver]'",
        ),
    ],
)
def test_a_part_that_was_not_asked_for_is_no_failure(
    site: Path, distribution: str, entry: str, reason: str
) -> None:
    install(site, distribution, entry, None, version=kvpage.__version__)
    status = statuses(PluginRegistry(strict=True))[entry.partition(" ")[0]]
    assert (status.status, status.reason) == ("unavailable", reason)


def test_damaged_metadata_is_listed(site: Path) -> None:
    install(site, "kvpage-alpha", "alpha = not an import string", None)
    install(site, "kvpage-beta", "beta = beta_plugin", policy_plugin("beta"))
    (site / "kvpage_beta-1.0.dist-info" / "METADATA").unlink()
    made = PluginRegistry()
    assert statuses(made)["alpha"].status == "failed"
    assert active(made) == ["beta"]
