"""Another process loads exactly the plugins that are active here, whatever is installed or set there."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import kvpage
from installed_plugins import forget, install, module, policy_plugin
from kvpage import PluginError, PluginRegistry
from kvpage.plugins import ResolvedPlugins

WORKER = """
import json, pickle, sys
from pathlib import Path
from kvpage import PluginRegistry
resolved = pickle.loads(Path(sys.argv[1]).read_bytes())
registry = PluginRegistry.from_resolved(resolved)
print(json.dumps([[(s.name, s.origin, s.version) for s in registry.statuses()],
                  [r.name for r in registry.scheduling_policies()], sorted(m for m in sys.modules if "_plugin" in m)]))
"""


def in_another_process(resolved: ResolvedPlugins, folder: Path, selection: str) -> list[list[object]]:
    (folder / "resolved").write_bytes(pickle.dumps(resolved))
    paths = [str(folder), str(Path(kvpage.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder / "resolved")],
        capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "KVPAGE_PLUGINS": selection},
    )  # fmt: skip
    found: list[list[object]] = json.loads(run.stdout)
    return found


def test_a_worker_has_exactly_the_active_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "kvpage-kept", "kept = kept_plugin", policy_plugin("kept"))
    install(tmp_path, "kvpage-broken", "broken = broken_plugin", "raise RuntimeError")
    install(tmp_path, "kvpage-out", "out = out_plugin", policy_plugin("out"))
    (tmp_path / "given_plugin.py").write_text(
        (tmp_path / "kept_plugin.py").read_text(encoding="utf-8").replace("'kept'", "'given'"),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("KVPAGE_PLUGINS", raising=False)
    given = importlib.import_module("given_plugin")
    try:
        made = PluginRegistry(plugins=[given], selection="-*,+kept,+broken")
        install(tmp_path, "kvpage-later", "later = later_plugin", policy_plugin("later"))
        plugins, policies, imported = in_another_process(made.resolved(), tmp_path, "-kept,+out_plugin")
    finally:
        forget("given_plugin", "kept_plugin", "broken_plugin", "out_plugin")
    assert plugins == [
        ["builtin", "kvpage", kvpage.__version__],
        ["given_plugin", "given to PluginRegistry", ""],
        ["kept", "kvpage-kept", "1.0"],
    ]
    assert policies == ["fcfs", "priority", "given", "kept"]
    assert imported == ["given_plugin", "kept_plugin"]


def test_an_object_of_this_process_is_named_where_it_should_go_to_another() -> None:
    made = PluginRegistry(plugins=[module(policy_plugin("p"), "made_here")], entry_points=False, strict=True)
    with pytest.raises(PluginError, match=r"'made_here' .* is an object of this process"):
        made.resolved()
    broken = PluginRegistry(plugins=[object()], entry_points=False)
    assert broken.resolved().plugins == ()


def test_what_cannot_be_imported_over_there_is_an_error_over_there() -> None:
    here = PluginRegistry(entry_points=False).resolved()
    (entry,) = pickle.loads(
        pickle.dumps(ResolvedPlugins(plugins=(_resolved("no_such_module:plugin"),)))
    ).plugins
    with pytest.raises(PluginError, match="No module named 'no_such_module'"):
        PluginRegistry.from_resolved(ResolvedPlugins((*here.plugins, entry)))


def _resolved(value: str) -> object:
    from kvpage.plugins.discovery import ResolvedPlugin

    return ResolvedPlugin(name="gone", origin="kvpage-gone", version="1", value=value)
