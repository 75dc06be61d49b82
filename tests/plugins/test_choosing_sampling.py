"""Which sampling kernel an engine takes, and why not each other one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sampling_of_plugins import Chip

from kvpage import ConfigError, PluginRegistry, hookimpl
from kvpage.api.records import SamplingKernelRecord
from kvpage.api.sampling import SamplingEnv
from kvpage.plugins.sampling import SamplingChoice, choose_sampling
from kvpage.sample.draw import TorchSampling

ENV = SamplingEnv("cpu", 11)


class Plugin:
    """Registers the records that it is given."""

    def __init__(self, *records: SamplingKernelRecord) -> None:
        self._records = records

    @hookimpl
    def kvpage_sampling_kernels(self) -> Sequence[SamplingKernelRecord]:
        return self._records


def record(name: str, factory: str = "Chip", **values: Any) -> SamplingKernelRecord:
    return SamplingKernelRecord(name=name, factory=f"sampling_of_plugins:{factory}", **values)


def choose(*records: SamplingKernelRecord, env: SamplingEnv = ENV) -> SamplingChoice:
    registry = PluginRegistry(plugins=[Plugin(*records)], entry_points=False, strict=True)
    return choose_sampling(registry.sampling_kernels(), env)


def test_without_plugins_the_torch_kernel_is_taken_on_any_device() -> None:
    for device in ("cpu", "cuda:1"):
        choice = choose(env=SamplingEnv(device, 11))
        assert (choice.record.name, choice.rejected) == ("torch", ())
        assert type(choice.kernel) is TorchSampling
        assert choice.kernel.env == SamplingEnv(device, 11)


def test_the_highest_priority_is_taken_then_the_first_name() -> None:
    choice = choose(record("b"), record("a"), record("low", priority=-1))
    assert (choice.record.name, choice.reason) == ("a", "a (by priority)")
    assert type(choice.kernel) is Chip
    assert choose(record("b", priority=1), record("a")).record.name == "b"


def test_a_kernel_for_another_device_is_passed_over_with_the_reason() -> None:
    chip = record("chip", devices=("cuda", "xpu"))
    assert choose(chip, env=SamplingEnv("cuda:0", 11)).record.name == "chip"
    choice = choose(chip)
    assert choice.reason == "torch (by priority; chip: no: it is for device cuda or xpu, this is cpu)"
    assert choice.broken == frozenset()


@pytest.mark.parametrize(
    ("factory", "reason", "defective"),
    [
        ("NoChip", "there is no chip for 11 tokens", False),
        ("NoDriver", "it cannot be made (OSError: no driver", True),
        ("Exits", "it cannot be made (SystemExit: licence", True),
        ("Unfinished", "it cannot be made (TypeError: ", True),
        ("Unrelated", "is no subclass of kvpage.api.sampling.SamplingKernel", True),
        ("Absent", "sampling_of_plugins:Absent cannot be imported", True),
    ],
)
def test_a_kernel_that_cannot_be_made_gives_way_with_the_reason(
    factory: str, reason: str, defective: bool
) -> None:
    choice = choose(record("chip", factory))
    assert choice.record.name == "torch"
    [(name, [found])] = choice.rejected
    assert name == "chip"
    assert reason in found
    assert choice.broken == (frozenset({"chip"}) if defective else frozenset())


def test_a_kernel_whose_modules_are_absent_is_never_imported() -> None:
    choice = choose(record("chip", "Absent", needs=("no_such_driver",), install="pip install driver"))
    assert choice.rejected == (("chip", ("needs pip install driver",)),)
    assert choice.broken == frozenset()


def test_where_no_kernel_serves_each_one_s_reason_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"no sampling kernel runs on device cpu: chip: no: there is no chip"
    ):
        choose_sampling([record("chip", "NoChip")], ENV)
    with pytest.raises(ConfigError, match="none is registered"):
        choose_sampling([], ENV)
