"""What every test of planted bugs asks of a suite."""

from __future__ import annotations

from typing import Any

import pytest

from kvpage.testing.suite import ConformanceError, ConformanceSuite


def finds(base: type[ConformanceSuite], case: str, message: str, **subject: Any) -> None:
    """The case of the suite fails on the subject, and its message matches."""
    cases = dict(type("Subject", (base,), subject)().cases())
    with pytest.raises(ConformanceError, match=message) as caught:
        cases[case]()
    assert caught.value.property == str(caught.value).partition(": ")[0]
