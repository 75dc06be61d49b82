"""Distributions as pip leaves them behind, in a folder of the test's own; and plugin modules made of text."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

HEADER = "from kvpage import hookimpl\nfrom kvpage.api.records import *\n"


def policy_plugin(name: str) -> str:
    """Source of a plugin that registers one scheduling policy."""
    return (
        "@hookimpl\n"
        "def kvpage_scheduling_policies():\n"
        f"    return [SchedulingPolicyRecord(name={name!r}, factory='kvpage.sched.policy:FirstComeFirstServed')]\n"
    )


def install(folder: Path, distribution: str, entry: str, source: str | None, *, version: str = "1.0") -> None:
    """Metadata of ``distribution`` with the entry point ``entry`` ("name = module"), and the module's source."""
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text(f"[kvpage]\n{entry}\n", encoding="utf-8")
    if source is not None:
        module = entry.partition("=")[2].partition("[")[0].strip()
        (folder / f"{module}.py").write_text(HEADER + source, encoding="utf-8")


def module(source: str, name: str = "made_of_text") -> ModuleType:
    """A module that exists in this process only."""
    made = ModuleType(name)
    exec(compile(HEADER + source, name, "exec"), made.__dict__)
    return made


def forget(*names: str) -> None:
    """Have modules imported anew."""
    for name in names:
        sys.modules.pop(name, None)
