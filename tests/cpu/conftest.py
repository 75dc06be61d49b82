"""Tests of the native backend: without a native library they are skipped, with the reason, or with
KVPAGE_REQUIRE_NATIVE=1 they fail."""

from __future__ import annotations

import os

import pytest

from kvpage_cpu.native import NativeLibraryError, open_library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        open_library()
    except NativeLibraryError as error:
        if os.environ.get("KVPAGE_REQUIRE_NATIVE") == "1":
            raise
        for item in items:
            if "cpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=str(error)))
