"""The pytest plugin of the suites: it registers their markers, for ``--strict-markers``, and does nothing else.

Opt in from a ``conftest.py``: ``pytest_plugins = ["kvpage.testing.plugin"]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MARKERS = ("kvpage_conformance: a test of one of kvpage's conformance suites (kvpage.testing)",)


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
