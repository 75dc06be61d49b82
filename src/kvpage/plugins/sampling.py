"""Choosing the sampling kernel of an engine, with a reason for each that was not taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpage.api.records import SamplingKernelRecord
from kvpage.api.sampling import SamplingEnv, SamplingKernel
from kvpage.errors import ConfigError, KvpageError, PluginError
from kvpage.plugins.discovery import BROKEN, describe
from kvpage.plugins.factories import load_class, unavailable
from kvpage.plugins.selection import Rejected, no_lines, with_reasons


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """A kernel, made for its engine; ``rejected`` has all that were asked before it, and ``broken`` those of them
    that are defective."""

    kernel: SamplingKernel
    record: SamplingKernelRecord
    rejected: Rejected
    broken: frozenset[str] = frozenset()

    @property
    def reason(self) -> str:
        """Its name and why it was chosen, in one line."""
        return with_reasons(self.record.name, "by priority", self.rejected)


def choose_sampling(records: Sequence[SamplingKernelRecord], env: SamplingEnv) -> SamplingChoice:
    """The first of ``records`` that is for the env's device and can be made.

    Raises:
        ConfigError: there is none; the message has each one's reason.
    """
    rejected: list[tuple[str, tuple[str, ...]]] = []
    broken: set[str] = set()
    for record in records:
        made, defective = _make(record, env)
        if isinstance(made, SamplingKernel):
            return SamplingChoice(made, record, tuple(rejected), frozenset(broken))
        rejected.append((record.name, (made,)))
        if defective:
            broken.add(record.name)
    reasons = "; ".join(no_lines(tuple(rejected))) or "none is registered"
    raise ConfigError(f"no sampling kernel runs on device {env.device}: {reasons}")


def _make(record: SamplingKernelRecord, env: SamplingEnv) -> tuple[SamplingKernel | str, bool]:
    """(the kernel, or why there is none; whether it is defective rather than not for this machine)."""
    device = env.device.partition(":")[0]
    if record.devices and device not in record.devices:
        return f"it is for device {' or '.join(record.devices)}, this is {device}", False
    lacking = unavailable(record)
    if lacking:
        return lacking, False
    try:
        kernel_class = load_class(record, SamplingKernel)
    except PluginError as error:
        return str(error).removeprefix(f"{record.name}: "), True
    try:
        kernel: SamplingKernel = kernel_class(env)
    except MemoryError:
        raise
    except KvpageError as error:  # it says that it cannot run here
        return str(error), False
    except BROKEN as error:  # foreign code
        return f"it cannot be made ({describe(error)})", True
    return kernel, False
