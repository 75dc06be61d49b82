"""What the machine can do right now, measured by a process of its own between any two runs.

Read bandwidth: all threads sum 512 MiB, 9 times, median; by a few lines of C where a compiler is there, else by torch.
Products: torch's 2048 x 2048 x 2048 product of the type, median of 7; of int8 the faster of ``torch._int_mm`` and
oneDNN's quantized linear layer.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEMORY = 512 * 2**20
READS = 9
PRODUCTS = 7
SIDE = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Probe:
    """The memory that is read and the matrices that are multiplied, made once."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._pages = mmap.mmap(-1, MEMORY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._pages, dtype=torch.float32)
        memory.fill_(1)
        library = compiled()
        if library is None:
            self._read: Callable[[], object] = memory.sum
        else:
            self._read = lambda: library.read_all(memory.data_ptr(), MEMORY, threads)
        self.reader = "torch.sum" if library is None else "read_bandwidth.c"
        self._products: dict[str, Callable[[], object]] = {}

    def bandwidth(self) -> float:
        """Bytes read a second."""
        self._read()
        return MEMORY / median_seconds(self._read, READS)

    def arithmetic(self, dtype: str) -> float:
        """Multiplications and additions a second of products of this type."""
        if dtype not in self._products:
            candidates = int8_products() if dtype == "int8" else [float_product(DTYPES[dtype])]
            self._products[dtype] = min(candidates, key=lambda product: median_seconds(product, 3))
        product = self._products[dtype]
        product()
        return 2.0 * SIDE**3 / median_seconds(product, PRODUCTS)


def compiled() -> Any | None:
    """``read_bandwidth.c`` as a library, where there is a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_bandwidth.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "read_bandwidth.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", source, "-o", target]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return None
        library = ctypes.CDLL(str(target))
    library.read_all.restype = ctypes.c_longlong
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def float_product(dtype: torch.dtype) -> Callable[[], object]:
    """A product of floats."""
    left, right = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
    return lambda: torch.nn.functional.linear(left, right)


def int8_products() -> list[Callable[[], object]]:
    """Every way torch has to multiply int8 on this CPU."""
    weight = torch.randint(-100, 100, (SIDE, SIDE), dtype=torch.int8)
    found: list[Callable[[], object]] = [lambda: torch._int_mm(weight, weight)]
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, [SIDE, SIDE])
        rows = torch.randint(0, 200, (SIDE, SIDE), dtype=torch.uint8)
        scales, zeros = torch.ones(SIDE), torch.zeros(SIDE, dtype=torch.int32)
        linear = torch.ops.onednn.qlinear_pointwise

        def quantized() -> object:
            return linear(rows, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")

        quantized()
    except (AttributeError, RuntimeError):
        return found
    return [*found, quantized]


def median_seconds(function: Callable[[], object], count: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Answer each line, a list of types, with bytes read a second and operations a second of each type."""
    probe = Probe(int(sys.argv[1]))
    print(json.dumps({"reader": probe.reader, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        found = {"bandwidth": probe.bandwidth()}
        found |= {dtype: probe.arithmetic(dtype) for dtype in json.loads(line)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
