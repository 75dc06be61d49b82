"""Finding the library, the instruction set, and saying why either is not to be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvpage import Engine, PluginRegistry
from kvpage.errors import ConfigError
from kvpage_cpu import native, plugin
from kvpage_cpu.native import (
    NativeLibraryError,
    available_isas,
    chosen_isa,
    describe,
    library_path,
    open_library,
)

TESTED = library_path()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``KVPAGE_CPU_LIBRARY`` points to; nothing lies there yet."""
    path = tmp_path / "library.so"
    monkeypatch.setenv("KVPAGE_CPU_LIBRARY", str(path))
    return path


@pytest.fixture
def copied(elsewhere: Path) -> Path:
    """The same place, with a copy of the library that is being tested."""
    shutil.copy(TESTED, elsewhere)
    return elsewhere


def test_a_library_may_lie_elsewhere(copied: Path) -> None:
    assert open_library()._name == str(copied)
    assert describe()[0].startswith(f"library: {copied} ")


def test_a_missing_library_says_how_to_get_one(elsewhere: Path) -> None:
    with pytest.raises(NativeLibraryError, match=r"is not there.*compiler.*cmake --workflow --preset native"):
        open_library()
    assert describe()[0].startswith(f"unavailable: the native library {elsewhere} is not there")


def test_a_library_of_another_version_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", 0)
    with pytest.raises(NativeLibraryError, match=r"this code needs 0: build or install it again"):
        open_library()


def test_what_is_no_native_library_is_refused(elsewhere: Path) -> None:
    elsewhere.write_text("no library", encoding="utf-8")
    with pytest.raises(NativeLibraryError, match=r"cannot be used \(.*\): build or install it again"):
        open_library()


@pytest.mark.parametrize("isa", native.ISAS)
def test_the_environment_chooses_the_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGE_CPU_ISA", isa)
    if isa not in available_isas():
        with pytest.raises(ConfigError, match=isa):
            chosen_isa()
        return
    assert chosen_isa() == (isa, "KVPAGE_CPU_ISA says so")
    assert f"chosen: {isa}, KVPAGE_CPU_ISA says so" in describe()


def test_without_a_choice_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPAGE_CPU_ISA", raising=False)
    assert chosen_isa()[0] == available_isas()[-1]
    assert available_isas()[0] == "portable"


def test_an_unknown_instruction_set_names_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPAGE_CPU_ISA", "avx9")
    with pytest.raises(ConfigError, match=r"KVPAGE_CPU_ISA='avx9'.*portable"):
        chosen_isa()
    assert describe()[0].startswith("unavailable: KVPAGE_CPU_ISA='avx9'")


def test_an_engine_without_the_library_goes_on_with_torch_and_keeps_the_reason(elsewhere: Path) -> None:
    with Engine("demo", plugins=PluginRegistry([plugin], entry_points=False)) as engine:
        assert (engine.config.decoder_backend, engine.config.attention_backend) == ("torch", "reference")
        assert any("is not there" in reason for reason in engine.config.reasons.values())
