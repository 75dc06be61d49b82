"""An engine draws its tokens with the sampling kernel that plugins bring, or with the builtin one where that fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from engine_state import MakeEngine

from kvpage import PluginRegistry, SamplingParams, hookimpl
from kvpage.api.records import SamplingKernelRecord
from kvpage.api.sampling import SamplingEnv
from kvpage.sample.draw import TorchSampling

HERE = "test_sampling_kernels_of_plugins"
PROMPT = [9, 8, 7]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=4, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True)


class Counting(TorchSampling):
    """Computes as the builtin kernel does, and counts."""

    calls: ClassVar[list[str]] = []

    def likeliest(self, logits: torch.Tensor) -> Any:
        self.calls.append("likeliest")
        return super().likeliest(logits)

    def draw(self, logits: torch.Tensor, shaping: Any, uniforms: Any) -> Any:
        self.calls.append("draw")
        return super().draw(logits, shaping, uniforms)


class NoDriver(TorchSampling):
    def __init__(self, env: SamplingEnv) -> None:
        raise OSError("no driver")


class Plugin:
    """Registers one kernel."""

    def __init__(self, factory: str) -> None:
        self.factory = factory

    @hookimpl
    def kvpage_sampling_kernels(self) -> Sequence[SamplingKernelRecord]:
        return [SamplingKernelRecord(name="chip", factory=f"{HERE}:{self.factory}", devices=("cpu",))]


def registry(factory: str) -> PluginRegistry:
    return PluginRegistry(plugins=[Plugin(factory)], entry_points=False, strict=True)


def test_an_engine_takes_the_kernel_of_a_plugin_and_says_so(make_engine: MakeEngine) -> None:
    plain = make_engine(plugins=PluginRegistry(entry_points=False))
    engine = make_engine(plugins=registry("Counting"))
    assert engine.config.reasons["sampling_kernel"] == "chip (by priority)"
    for params, call in ((GREEDY, "likeliest"), (DRAWN, "draw")):
        Counting.calls.clear()
        [found] = engine.generate([PROMPT], params)
        assert Counting.calls == [call] * 4
        assert found.outputs[0].token_ids == plain.generate([PROMPT], params)[0].outputs[0].token_ids


def test_a_kernel_that_cannot_be_made_gives_way_with_a_warning(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(plugins=registry("NoDriver"))
    reason = engine.config.reasons["sampling_kernel"]
    assert reason.startswith("torch (by priority; chip: no: it cannot be made (OSError: no driver")
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("sampling kernel chip: no: it cannot be made")
    assert len(engine.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == 4
