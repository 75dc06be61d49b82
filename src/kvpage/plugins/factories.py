"""What a record's factory names: imported, of the right kind, made; or why it cannot be had."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from kvpage.api.records import Record
from kvpage.errors import KvpageError, PluginError
from kvpage.plugins.discovery import BROKEN, describe


def load(record: Record) -> Any:
    """What a record's factory names.

    Raises:
        PluginError: something it needs is not installed, the module cannot be imported, or lacks the name.
    """
    needs = unavailable(record)
    if needs:
        raise PluginError(f"{record.name} {needs}")
    module, _, name = record.factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except BROKEN as error:  # importing foreign code may raise anything
        raise PluginError(f"{record.name}: {record.factory} cannot be imported: {describe(error)}") from error


def load_class(record: Record, base: type[Any]) -> Any:
    """The class that a record's factory names.

    Raises:
        PluginError: as ``load``; or it is no subclass of ``base``.
    """
    found = load(record)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{record.name}: {record.factory} is no subclass of {_path(base)}")
    return found


def make(record: Record, base: type[Any], what: str) -> Any:
    """An object of what a record's factory names, which needs no arguments; ``what`` it is called: "event listener".

    Raises:
        PluginError: as ``load``; or it cannot be made, or is no ``base``.
    """
    factory = load(record)
    try:
        found = factory()
    except (KvpageError, MemoryError):
        raise
    except Exception as error:  # a plugin's constructor may raise anything
        raise PluginError(
            f"{what} {record.name!r} cannot be made ({describe(error)}): leave its plugin out or repair it"
        ) from error
    if not isinstance(found, base):
        raise PluginError(
            f"{what} {record.name!r}: {record.factory} makes {found!r:.80}, which is no {_path(base)}: leave its "
            "plugin out or repair it"
        )
    return found


def description(record: Record) -> tuple[str, ...]:
    """The lines of what a record's ``describe`` names, or one that says why there are none."""
    needs = unavailable(record)
    if needs:
        return (needs,)
    module, _, name = record.describe.partition(":")
    try:
        told = getattr(importlib.import_module(module), name)()
        return tuple(
            line for entry in ([told] if isinstance(told, str) else told) for line in str(entry).splitlines()
        )
    except BROKEN as error:  # foreign code may raise anything
        return (f"{record.describe} raised {describe(error)}",)


def unavailable(record: Record) -> str:
    """ "needs ..." where a module that the record needs is not installed, else "". Nothing is imported."""
    missing = [name for name in record.needs if not _is_installed(name)]
    if not missing:
        return ""
    return f"needs {record.install or ', '.join(missing) + ', which is not installed'}"


def lacking(record: Record) -> str:
    """Why the record cannot be used, as far as that is known before anything is imported; "" where nothing is.

    What it needs is not installed, or its factory lies in a module that is nowhere.
    """
    module = record.factory.partition(":")[0]
    return unavailable(record) or ("" if _is_installed(module) else f"there is no module {module} to make it")


def _path(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _is_installed(module: str) -> bool:
    """Whether ``module`` can be found, without importing the packages that it lies in."""
    if sys.modules.get(module) is not None:
        return True
    path: Sequence[str] | None = None
    parts = module.split(".")
    try:
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            spec = (
                importlib.util.find_spec(name)
                if end == 1
                else importlib.machinery.PathFinder.find_spec(name, path)
            )
            if spec is None:
                return False
            path = spec.submodule_search_locations
            if path is None and end < len(parts):
                return False
    except (ImportError, ValueError):
        return False
    return True
