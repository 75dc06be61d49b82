"""A plugin is a guest in somebody's process: what belongs to the host is after each call as it was before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from kvpage.testing.suite import ConformanceError

OF_TORCH = ("TORCH", "PYTORCH", "TRITON", "CUDA_MODULE_LOADING")
"""Variables that torch itself sets on first use of a device or of its compiler."""


@dataclass(frozen=True)
class HostState:
    """What a guest leaves alone. ``random`` states: of Python's, torch's and each initialised GPU's generator."""

    default_dtype: torch.dtype
    default_device: torch.device
    grad_mode: bool
    inference_mode: bool
    threads: int
    threads_between_operations: int
    python_random: object
    torch_random: bytes
    gpu_random: tuple[bytes, ...]
    environment: Mapping[str, str]

    @classmethod
    def now(cls) -> HostState:
        """As it is."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            default_dtype=torch.get_default_dtype(),
            default_device=torch.get_default_device(),
            grad_mode=torch.is_grad_enabled(),
            inference_mode=torch.is_inference_mode_enabled(),
            threads=torch.get_num_threads(),
            threads_between_operations=torch.get_num_interop_threads(),
            python_random=random.getstate(),
            torch_random=_bytes(torch.get_rng_state()),
            gpu_random=tuple(_bytes(state) for state in gpus),
            environment={name: value for name, value in os.environ.items() if not name.startswith(OF_TORCH)},
        )

    def differences(self, before: HostState) -> list[str]:
        """What is not as it was, in words."""
        found = []
        for field in fields(self):
            was, now = getattr(before, field.name), getattr(self, field.name)
            if was == now or (field.name == "gpu_random" and not was):
                continue
            name = field.name.replace("_", " ")
            if field.name == "environment":
                changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
                found += [f"environ[{key!r}] (got {now.get(key)!r}, was {was.get(key)!r})" for key in changed]
            elif field.name.endswith("random"):
                found.append(f"{name} (its state is another: numbers were drawn from it, or it was seeded)")
            else:
                found.append(f"{name} (got {now}, was {was})")
        return found

    def restore(self) -> None:
        """Give the host back what can be given back."""
        torch.set_default_dtype(self.default_dtype)
        if torch.get_default_device() != self.default_device:
            plain = self.default_device.type == "cpu"
            torch.set_default_device(None if plain else self.default_device)
        torch.set_grad_enabled(self.grad_mode)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_rng_state(torch.frombuffer(bytearray(self.torch_random), dtype=torch.uint8))
        random.setstate(self.python_random)  # type: ignore[arg-type]
        for name in {*os.environ, *self.environment}:
            if name.startswith(OF_TORCH) or os.environ.get(name) == self.environment.get(name):
                continue
            if name in self.environment:
                os.environ[name] = self.environment[name]
            else:
                del os.environ[name]


@contextmanager
def host_kept(what: str, property: str = "guest manners") -> Iterator[HostState]:
    """The block, a call of ``what``, leaves the process as it found it; it is so afterwards in any case.

    Raises:
        ConformanceError: naming the call, what it changed and both values.
    """
    __tracebackhide__ = True
    before = HostState.now()
    try:
        yield before
        found = HostState.now().differences(before)
    finally:
        before.restore()
    if found:
        raise ConformanceError(property, f"{what} changed the process it is a guest in: {'; '.join(found)}")


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())
