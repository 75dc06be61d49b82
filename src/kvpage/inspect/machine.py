"""Memory of this machine, found without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

MIB = 2**20


def total_memory() -> int:
    """Bytes of memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that can be had without swapping: MemAvailable where Linux tells it, else what is free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def nvidia_gpus() -> list[tuple[str, int]]:
    """(name, bytes of memory) of each NVIDIA GPU, as its driver's own tool tells; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        rows = [line.rpartition(",") for line in answer.splitlines() if line.strip()]
        return [(name.strip(), int(size) * MIB) for name, _, size in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
