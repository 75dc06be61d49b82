"""Sampling kernels that plugins of these tests register by import string."""

from __future__ import annotations

from typing import Any

from kvpage import ConfigError
from kvpage.api.sampling import SamplingEnv, SamplingKernel
from kvpage.sample.draw import TorchSampling


class Chip(TorchSampling):
    """Computes as the builtin kernel does, under another name."""


class NoChip(TorchSampling):
    def __init__(self, env: SamplingEnv) -> None:
        raise ConfigError(f"there is no chip for {env.vocab_size} tokens")


class NoDriver(TorchSampling):
    def __init__(self, env: SamplingEnv) -> None:
        raise OSError("no driver")


class Exits(TorchSampling):
    def __init__(self, env: SamplingEnv) -> None:
        raise SystemExit("licence")


class Unfinished(SamplingKernel):
    def likeliest(self, logits: Any) -> Any: ...


class Unrelated:
    def __init__(self, env: SamplingEnv) -> None: ...
