"""The native library: found, checked and opened; and contexts, through which everything is computed."""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from pathlib import Path

import torch

from kvpage.errors import ConfigError, PluginError
from kvpage_cpu.structs import SIGNATURES

ABI_VERSION = 3
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets by their number in csrc/abi.h; each includes those before it."""
ISA_VARIABLE = "KVPAGE_CPU_ISA"
LIBRARY_VARIABLE = "KVPAGE_CPU_LIBRARY"
LIBRARY_NAME = "libkvpage_cpu.so"
FAULTS = {
    1: "there is no memory for its workspace: lower max_num_batched_tokens",
    2: "the process was forked after the engine was made, and its threads stayed behind: start the child by spawn "
    "(torch's own threads do not outlive a fork either) and make its engine there",
}


class NativeLibraryError(PluginError):
    """The native library is missing, stale, or cannot be loaded here."""


def library_path() -> Path:
    """Where the library is expected: beside this file, or where ``KVPAGE_CPU_LIBRARY`` says."""
    return Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name(LIBRARY_NAME))


def open_library() -> ctypes.CDLL:
    """The library, opened once a path.

    Raises:
        NativeLibraryError: it is not there, does not load, or is of another version than this code.
    """
    return _open(library_path())


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise NativeLibraryError(
            f"the native library {path} is not there: this kvpage was installed without a C++ compiler (reinstall it "
            "with one), or runs from a checkout (build it there: cmake --workflow --preset native)"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.kvp_abi_version()
        if version != ABI_VERSION:
            raise NativeLibraryError(
                f"the native library {path} has ABI {version}, this code needs {ABI_VERSION}: build or install it again"
            )
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(
            f"the native library {path} cannot be used ({error}): build or install it again"
        ) from error
    return library


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the library has and this processor can run, the best last."""
    library = open_library()
    best = int(library.kvp_best_isa())
    return tuple(name for number, name in enumerate(ISAS[: best + 1]) if library.kvp_isa_name(number))


def chosen_isa() -> tuple[str, str]:
    """The instruction set that contexts take, and why.

    Raises:
        ConfigError: ``KVPAGE_CPU_ISA`` names one that is unknown, or that cannot run here.
    """
    available = available_isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return available[-1], "the best that this processor has"
    if wanted not in available:
        raise ConfigError(
            f"{ISA_VARIABLE}={wanted!r}: this processor and library have {', '.join(available)}; "
            "take one of them, or unset it"
        )
    return wanted, f"{ISA_VARIABLE} says so"


def describe() -> list[str]:
    """What ``kvpage collect-env`` shows of this backend."""
    try:
        isa, why = chosen_isa()
    except (NativeLibraryError, ConfigError) as error:
        return [f"unavailable: {error}"]
    return [
        f"library: {library_path()} (ABI {ABI_VERSION})",
        f"instruction sets: {', '.join(available_isas())}",
        f"chosen: {isa}, {why}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads() when an engine is made)",
    ]


class Context:
    """One user of the native library: an instruction set, and a team of threads shared with contexts of that size.

    Not thread-safe, but contexts of several threads may be used at once: their calls take turns.

    Args:
        isa: one of ``ISAS``; ``None``: ``KVPAGE_CPU_ISA``, or the best that runs here.
        threads: ``None``: as many as torch has now.

    Raises:
        NativeLibraryError: there is no usable library, or the system gives no threads.
        ConfigError: the instruction set cannot run here.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        self.library = open_library()
        self.isa = chosen_isa()[0] if isa is None else isa
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.isa not in available_isas():
            raise ConfigError(
                f"instruction set {self.isa!r} cannot run here: use one of {', '.join(available_isas())}"
            )
        handle = self.library.kvp_open(ISAS.index(self.isa), self.threads)
        if not handle:
            raise NativeLibraryError(f"the system gives no {self.threads} threads or no memory")
        self.handle = handle
        self._close = weakref.finalize(self, self.library.kvp_close, handle)

    def close(self) -> None:
        """Gives threads and memory back; idempotent, and done with the last reference."""
        self._close()

    def check(self, code: int) -> None:
        """Raises PluginError where a call of the library returned a fault."""
        if code:
            raise PluginError(f"the native CPU backend failed: {FAULTS.get(code, f'code {code}')}")

    def read_bandwidth(self, memory: torch.Tensor) -> float:
        """Bytes a second at which the team reads ``memory`` (CPU, contiguous), measured once."""
        size = memory.numel() * memory.element_size()
        return float(self.library.kvp_read_bandwidth(self.handle, memory.data_ptr(), size))
