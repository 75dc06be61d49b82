"""What the conformance suites share: parameters that follow the subject's claims, skips with a reason, failures
that name a property. Usable without pytest, which ``kvpage plugins check`` may not find."""

from __future__ import annotations

import inspect
import itertools
import sys
import unittest
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn


class ConformanceError(AssertionError):
    """A property of the contract does not hold; ``property`` is its name, the message has the rest."""

    def __init__(self, property: str, finding: str) -> None:
        super().__init__(f"{property}: {finding}")
        self.property = property


class ConformanceSuite:
    """Base of the suites. A test is a method ``test_<property>``; its parameters are names of ``axes()``."""

    pytestmark: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "pytest" in sys.modules and cls.__name__.startswith("Test"):
            own = vars(cls).get("pytestmark", [])
            marks = own if isinstance(own, list) else [own]
            cls.pytestmark = [*marks, sys.modules["pytest"].mark.kvpage_conformance]

    def axes(self) -> dict[str, Sequence[Any]]:
        """Every parameter that a test of the suite may take -> the values it is run with."""
        return {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook for the tests of a class: one test a value of each axis that the test names
        and does not parametrize itself."""
        own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
        given = {
            name.strip() for names in own for name in (names.split(",") if isinstance(names, str) else names)
        }
        for name, values in self.axes().items():
            if name in metafunc.fixturenames and name not in given:
                metafunc.parametrize(name, list(values), ids=[str(value) for value in values])

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(name as pytest prints it, a call that runs it) of every case, in pytest's order: the last base's first."""
        axes = self.axes()
        seen: set[str] = set()
        names: list[str] = []
        for owner in type(self).__mro__:
            own = [name for name in vars(owner) if name.startswith("test_") and name not in seen]
            seen.update(own)
            names = own + names
        for name in names:
            test = getattr(type(self), name)
            if not callable(test):
                continue
            parameters = [p for p in inspect.signature(test).parameters if p != "self"]
            for values in itertools.product(*(axes[p] for p in parameters)):
                label = f"{name}[{'-'.join(map(str, values))}]" if values else name
                yield label, _bound(getattr(self, name), dict(zip(parameters, values, strict=True)))


def not_claimed(reason: str) -> NoReturn:
    """Skip the running test: the subject does not claim what it would prove."""
    raise unittest.SkipTest(reason)


def _bound(test: Callable[..., None], values: dict[str, Any]) -> Callable[[], None]:
    return lambda: test(**values)
