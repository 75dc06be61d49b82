"""The native sampling kernel is taken where its library loads, else the torch kernel is, and the reason is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpage import PluginRegistry
from kvpage.api.sampling import SamplingEnv
from kvpage.plugins.sampling import SamplingChoice, choose_sampling
from kvpage_cpu import native, plugin


def choice(device: str = "cpu") -> SamplingChoice:
    registry = PluginRegistry(plugins=[plugin], entry_points=False, strict=True)
    return choose_sampling(registry.sampling_kernels(), SamplingEnv(device, 1000))


def test_without_its_library_it_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    found = choice()
    assert (found.record.name, found.broken) == ("torch", frozenset())
    assert found.reason.startswith("torch (by priority; cpu: no: the native library ")


def test_with_its_library_it_is_taken_on_the_cpu_alone() -> None:
    try:
        native.open_library()
    except native.NativeLibraryError as error:
        pytest.skip(str(error))
    assert choice().reason == "cpu (by priority)"
    assert choice("cuda:0").reason == ("torch (by priority; cpu: no: it is for device cpu, this is cuda)")
