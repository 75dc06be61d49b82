"""What all tests share: one torch thread a worker, since pytest-xdist already uses every core."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The markers of kvpage's conformance suites, as a third party makes them known.
pytest_plugins = ["kvpage.testing.plugin"]

# Read by OpenMP and MKL when torch is first imported, so before any test module is. The tests' own process is
# the host here; kvpage never writes the environment.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# How long an example takes says how busy the machine is, not whether the code is right. CI draws the same examples
# every time, so that a red run is the change's own doing; everywhere else each run explores further.
settings.register_profile(
    "kvpage",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvpage")
