"""What all tests share: one torch thread a worker, since pytest-xdist already uses every core."""

from __future__ import annotations

import os

# Read by OpenMP and MKL when torch is first imported, so before any test module is. The tests' own process is
# the host here; kvpage never writes the environment.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
