"""Conformance suites: subclass one in your tests, name your class, and pytest proves that it keeps the contract.

Nothing here is loaded unless it is asked for: put ``pytest_plugins = ["kvpage.testing.plugin"]`` into your
``conftest.py``, so that the markers are known, and import the suite that you need from its module. The suites
need pytest and torch, no more.

The names of suites, of their tests and of what a subclass may set are API: people deselect tests by name. They
are renamed, moved or removed only as ``kvpage.api`` is, with a deprecation of two minor releases; new tests may
come with any minor release.

``dequantize_checkpoint`` gives the matrices of a checkpoint as plain numbers, to hold them against another tool's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpage.testing.dequantize import dequantize_checkpoint

__all__ = ["dequantize_checkpoint"]


def __getattr__(name: str) -> Any:
    """``dequantize_checkpoint`` when it is first used: it needs torch, which the rest of this module does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvpage.testing.dequantize import dequantize_checkpoint

    return dequantize_checkpoint
