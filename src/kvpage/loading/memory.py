"""Memory of the engine's own: anonymous mappings that torch tensors are views of.

The allocator of the host process never sees weights or KV: what an engine took goes back to the system when it
is closed, whatever the process's heap looks like by then.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch

CHUNK_BYTES = 2**20
SLAB_BYTES = 32 * 2**20
ALIGNMENT = 64


class Arena:
    """Anonymous mappings, handed out as zeroed CPU tensors; memory is only taken once it is touched.

    A mapping goes back to the system when the last tensor in it dies. Large tensors have a mapping each, small
    ones share one. Not thread-safe: one engine, one thread at a time.
    """

    __slots__ = ("_chunk", "_closed", "_regions", "_slab", "_slab_used", "_used", "allocated_bytes")

    def __init__(self) -> None:
        self._regions: list[weakref.ref[mmap.mmap]] = []
        self._chunk: mmap.mmap | None = None
        self._slab: mmap.mmap | None = None
        self._used = self._slab_used = 0
        self._closed = False
        self.allocated_bytes = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, *, huge_pages: bool = False) -> torch.Tensor:
        """A zeroed, contiguous tensor, its data aligned to 64 bytes.

        With ``huge_pages`` large tensors that are asked for one after another lie so, on pages of 2 MiB where the
        system has them: for what is filled whole and read as a stream (weights).

        Raises:
            ValueError: the arena is closed.
            OSError: the system gives no address space.
        """
        if self._closed:
            raise ValueError("this arena is closed; make a new one")
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        size = count * dtype.itemsize
        self.allocated_bytes += size
        region, offset = self._place_in_slab(size) if huge_pages else self._place(size)
        # frombuffer keeps a reference to the mapping; the mapping unmaps itself when that one is gone.
        return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def close(self) -> None:
        """Give all pages back at once; the address range goes with the last tensor. Idempotent.

        A tensor that outlives its arena stays valid memory, and reads zeros.
        """
        self._closed = True
        self._chunk = self._slab = None
        for reference in self._regions:
            region = reference()
            if region is not None and hasattr(mmap, "MADV_DONTNEED"):
                region.madvise(mmap.MADV_DONTNEED)
        self._regions.clear()
        self.allocated_bytes = 0

    def _place(self, size: int) -> tuple[mmap.mmap, int]:
        if size >= CHUNK_BYTES:
            return self._map(size), 0
        offset = -(-self._used // ALIGNMENT) * ALIGNMENT
        if self._chunk is None or offset + size > CHUNK_BYTES:
            self._chunk, offset = self._map(CHUNK_BYTES), 0
        self._used = offset + size
        return self._chunk, offset

    def _place_in_slab(self, size: int) -> tuple[mmap.mmap, int]:
        if size < CHUNK_BYTES:
            return self._place(size)
        offset = -(-self._slab_used // ALIGNMENT) * ALIGNMENT
        if self._slab is None or offset + size > len(self._slab):
            self._slab, offset = self._map(max(size, SLAB_BYTES)), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    self._slab.madvise(mmap.MADV_HUGEPAGE)
        self._slab_used = offset + size
        return self._slab, offset

    def _map(self, size: int) -> mmap.mmap:
        region = anonymous_mapping(size)
        self._regions.append(weakref.ref(region))
        return region


def anonymous_mapping(size: int) -> mmap.mmap:
    """``size`` bytes of zeroed memory that no one else sees; address space only until touched."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    # Without NORESERVE the kernel may refuse a mapping larger than free memory that will never be filled.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def trim_heap() -> None:
    """Give free pages of the process's heap back to the system, where its C library can (glibc).

    Activations come from the heap, and glibc keeps up to 64 MiB of what was freed for the next allocation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
