"""Finding plugins and importing each by itself, so that a broken one is listed with its reason and harms nobody."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import kvpage
from kvpage.api import API_VERSION
from kvpage.api.records import Record
from kvpage.errors import PluginError
from kvpage.hookspecs import PROJECT

BUILTIN = "builtin"
BUILTIN_MODULE = "kvpage.builtin.plugin"
GIVEN = "given to PluginRegistry"
VARIABLE = "KVPAGE_PLUGINS"
BROKEN = (Exception, SystemExit)
"""What foreign code may raise, at import or in a hook, without taking the host down."""

OWN_FOLDER = os.path.join(os.path.dirname(kvpage.__file__), "")
IMPORT_MACHINERY = frozenset({importlib.__file__, importlib.metadata.__file__})

MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
API_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})", re.ASCII)


@dataclass(slots=True)
class PluginStatus:
    """One plugin as ``kvpage plugins list`` shows it.

    Attributes:
        name: of the entry point, the module, or the given object's class.
        origin: the distribution that offers it, or who named it.
        version: of the distribution or module, "" where none is stated.
        api_version: the oldest ``kvpage.api`` it says it works with, "" where it says nothing.
        value: what to import in another process, "package.module" or "package.module:Name"; "" for an object that
            lives in this process only.
        status: "disabled": left out on request; "unavailable": it needs something that is not installed.
        reason: why it is not active.
        records: what it registered; empty unless it is active.
    """

    name: str
    origin: str
    version: str = ""
    api_version: str = ""
    value: str = ""
    status: Literal["active", "failed", "disabled", "unavailable"] = "active"
    reason: str = ""
    records: list[Record] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """A plugin that was found: ``plugin`` is ``None`` where it is not to be used, for ``error`` if it is broken."""

    status: PluginStatus
    plugin: object | None = None
    error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Keep why, and nothing else of it."""
        self.plugin, self.error = None, error
        self.status.status, self.status.reason = "failed", describe(error)
        self.status.records = []


@dataclass(frozen=True, slots=True)
class ResolvedPlugin:
    """One active plugin, as another process can import it."""

    name: str
    origin: str
    version: str
    value: str


@dataclass(frozen=True, slots=True)
class ResolvedPlugins:
    """The active plugins of a registry in their order, without the builtin one: small, frozen, picklable."""

    plugins: tuple[ResolvedPlugin, ...]


def describe(error: BaseException) -> str:
    """An error as a reason, in one line: of one that is not kvpage's own its type, and where foreign code raised it."""
    if isinstance(error, PluginError):
        return str(error)
    text = _first_line(str(error))
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _raised_at(error)
    if place:
        text += f", at {place}"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == PROJECT:
        text += f"; it may need another kvpage than this one ({kvpage.__version__}): pip install -U kvpage"
    return text


def _first_line(text: str) -> str:
    """The first line with anything in it; " ..." says that there are more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(lines[:1]) + (" ..." if len(lines) > 1 else "")


def _raised_at(error: BaseException) -> str:
    """ "file:line" of the innermost frame that is neither kvpage's nor of the import machinery, "" without one."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        inner = frame.filename.startswith((OWN_FOLDER, "<frozen ")) or frame.filename in IMPORT_MACHINERY
        if not inner:
            return f"{frame.filename}:{frame.lineno}"
    return ""


def find_plugins(plugins: Iterable[object], *, entry_points: bool, selection: str | None) -> list[Found]:
    """The builtin plugin, those given, and those of installed distributions by name; imported, not registered.

    ``selection``: in place of the variable KVPAGE_PLUGINS; neither matters without ``entry_points``.
    """
    found = [_builtin(), *_given(plugins)]
    if entry_points:
        found += _installed(selection, {entry.status.name: entry.status.origin for entry in found})
    return found


def find_resolved(resolved: ResolvedPlugins) -> list[Found]:
    """The builtin plugin and exactly those of ``resolved``, imported; nothing else is looked at."""
    found = [_builtin()]
    for wanted in resolved.plugins:
        status = PluginStatus(wanted.name, wanted.origin, wanted.version, value=wanted.value)
        found.append(_imported(status, functools.partial(_import, wanted.value)))
    return found


def check_api_version(name: str, stated: object) -> str:
    """``KVPAGE_API_VERSION`` of the plugin ``name``, where this kvpage has that api; "" where it states none.

    Raises:
        PluginError: it is malformed, newer than this kvpage's, or of another major version.
    """
    if stated is None:
        return ""
    match = API_NUMBERS.fullmatch(stated) if isinstance(stated, str) else None
    if match is None:
        raise PluginError(
            f"{name} states KVPAGE_API_VERSION = {stated!r:.80}: "
            f"it must be text of two numbers, such as {API_VERSION!r}"
        )
    wanted = (int(match[1]), int(match[2]))
    major, _, minor = API_VERSION.partition(".")
    here = (int(major), int(minor))
    if wanted > here:
        raise PluginError(f"{name} needs kvpage api {stated}, this is {API_VERSION}: pip install -U kvpage")
    if wanted[0] != here[0]:
        raise PluginError(
            f"{name} was made for kvpage api {stated}, which this kvpage (api {API_VERSION}) no longer has: "
            "install a newer version of the plugin"
        )
    return match[0]


def _builtin() -> Found:
    status = PluginStatus(BUILTIN, "kvpage", kvpage.__version__, value=BUILTIN_MODULE)
    return _imported(status, functools.partial(_import, BUILTIN_MODULE))


def _given(plugins: Iterable[object]) -> Iterator[Found]:
    if isinstance(plugins, (str, ModuleType)) or not isinstance(plugins, Iterable):
        raise PluginError(f"plugins must be a list of modules or objects, got {plugins!r:.80}")
    counts: dict[str, int] = {}
    for plugin in plugins:
        name = plugin.__name__ if isinstance(plugin, (ModuleType, type)) else type(plugin).__name__
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1 and not isinstance(plugin, ModuleType):
            name = f"{name}-{counts[name]}"
        importable = isinstance(plugin, ModuleType) and name != "__main__" and sys.modules.get(name) is plugin
        status = PluginStatus(name, GIVEN, _stated_version(plugin), value=name if importable else "")
        yield _accepted(status, plugin)


def _installed(selection: str | None, taken: dict[str, str]) -> Iterator[Found]:
    """Entry points by name, then the modules that ``selection`` names; ``taken``: origins of names in use."""
    source = VARIABLE if selection is None else "selection"
    points = sorted(
        importlib.metadata.entry_points(group=PROJECT), key=lambda p: (p.name, _origin(p), p.value)
    )
    text = os.environ.get(VARIABLE, "") if selection is None else selection
    chosen = Selection({point.name for point in points}, text)
    for point in points:
        origin = _origin(point)
        status = PluginStatus(
            point.name, origin, _version_of(point), value=point.value.partition("[")[0].strip()
        )
        if point.name in chosen.left_out:
            status.status, status.reason = "disabled", f"left out by {source}: {chosen.left_out[point.name]}"
            yield Found(status)
        elif point.name in taken:
            found = Found(status)
            found.fail(PluginError(
                f"{origin} offers a plugin {point.name!r}, a name that {taken[point.name]} already has: "
                "uninstall one, or ask its author for another name"
            ))  # fmt: skip
            yield found
        else:
            taken[point.name] = origin
            yield _of_entry_point(status, point)
    for name in chosen.modules:
        found = _imported(PluginStatus(name, source, value=name), functools.partial(_import, name))
        found.status.version = _stated_version(found.plugin)
        yield found
    for item, problem in chosen.problems:
        found = Found(PluginStatus(item, source))
        found.fail(PluginError(f"{source}: {problem}"))
        yield found


class Selection:
    """``"-name,+name"``, applied left to right to the plugins that are installed.

    Attributes:
        left_out: names that are not to be used -> the item that says so.
        modules: modules that are to be imported besides, in order.
        problems: (item, what is wrong with it).
    """

    def __init__(self, names: set[str], text: str) -> None:
        self._names = names
        self.left_out: dict[str, str] = {}
        self.modules: list[str] = []
        self.problems: list[tuple[str, str]] = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            problem = self._apply(item, item[:1], item[1:].strip())
            if problem:
                self.problems.append((item, problem))

    def _apply(self, item: str, sign: str, name: str) -> str:
        """What is wrong with it, or ""."""
        if sign not in "+-" or not name:
            return (
                f"{item!r} must begin with '-', to leave a plugin out, or '+', to bring one in, and name it"
            )
        if name == BUILTIN:
            return "" if sign == "+" else "the builtin plugin cannot be left out"
        if name == "*":
            self.left_out = dict.fromkeys(self._names, item) if sign == "-" else {}
        elif sign == "+" and name in self._names:
            self.left_out.pop(name, None)
        elif sign == "+" and MODULE_NAME.fullmatch(name):
            self.modules += [] if name in self.modules else [name]
        elif sign == "+":
            return f"{name!r} is neither an installed plugin ({self._known()}) nor the name of a module"
        elif name in self.modules:
            self.modules.remove(name)
        elif name in self._names:
            self.left_out[name] = item
        else:
            return f"there is no plugin {name!r} to leave out; installed: {self._known()}"
        return ""

    def _known(self) -> str:
        return ", ".join(sorted(self._names)) or "none"


def _of_entry_point(status: PluginStatus, point: importlib.metadata.EntryPoint) -> Found:
    found = _imported(status, point.load)
    absent = isinstance(found.error, ModuleNotFoundError) and not _is_ours(found.error.name)
    if absent and (point.extras or status.origin == "kvpage"):
        # A part that comes with an extra and was not asked for is no defect.
        assert isinstance(found.error, ModuleNotFoundError)
        found.status.status = "unavailable"
        found.status.reason = (
            f"needs pip install '{status.origin}[{','.join(point.extras)}]'"
            if point.extras
            else f"needs {found.error.name}, which is not installed"
        )
        found.error = None
    return found


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == PROJECT


def _imported(status: PluginStatus, importer: Callable[[], object]) -> Found:
    """What ``importer`` gives, or why it cannot be used."""
    try:
        plugin = importer()
    except BROKEN as error:
        found = Found(status)
        found.fail(error)
        return found
    return _accepted(status, plugin)


def _accepted(status: PluginStatus, plugin: object) -> Found:
    """The plugin with the api version it states, or why it cannot be used."""
    found = Found(status)
    try:
        if plugin is None or isinstance(plugin, str):
            raise PluginError(f"{plugin!r:.80} is no plugin: give a module, or an object with hooks")
        stated = getattr(plugin, "KVPAGE_API_VERSION", None)
        status.api_version = stated if isinstance(stated, str) else ""
        check_api_version(status.name, stated)
        found.plugin = plugin
    except BROKEN as error:
        found.fail(error)
    return found


def _import(value: str) -> object:
    module, _, name = value.partition(":")
    return functools.reduce(getattr, filter(None, name.split(".")), importlib.import_module(module))


def _origin(point: importlib.metadata.EntryPoint) -> str:
    """The distribution's name; damaged metadata may have none."""
    return str((point.dist.name if point.dist else None) or point.value)


def _version_of(point: importlib.metadata.EntryPoint) -> str:
    try:
        return str((point.dist.version if point.dist else None) or "")
    except KeyError:  # no version in its metadata
        return ""


def _stated_version(plugin: object) -> str:
    version = vars(plugin).get("__version__") if isinstance(plugin, ModuleType) else None
    return version if isinstance(version, str) else ""
