"""Logits processors and event listeners of plugins, well-behaved and not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from engine_state import MakeEngine

from kvpage import Engine, PluginError, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.events import EventListener, StepStats
from kvpage.api.records import EventListenerRecord, LogitsProcessorRecord
from kvpage.api.sampling import LogitsProcessor
from kvpage.outputs import FinishReason, RequestMetrics

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SELF = __name__


class CountUp(LogitsProcessor):
    """Forces ``start``, ``start`` + 1, ... from what it was told, so every missed call shows."""

    def __init__(self) -> None:
        self.following: dict[int, int] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.following[slot] = int(params.extra_args["start"])

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        forced = torch.full_like(logits, float("-inf"))
        for row, slot in enumerate(slots):
            forced[row, self.following[slot]] = 0.0
        return forced

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self.following[slot] = token_ids[-1] + 1

    def release(self, slot: int) -> None:
        del self.following[slot]


class Faulty(LogitsProcessor):
    """Raises in the method that the request's ``extra_args`` names."""

    def __init__(self) -> None:
        self.fault: dict[int, str] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        if params.extra_args["in"] == "admit":
            raise RuntimeError("boom in admit")
        self.fault[slot] = params.extra_args["in"]

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        for slot in slots:
            self._raise(slot, "apply")
        return logits

    def advance(self, slot: int, token_ids: Sequence[int]) -> None:
        self._raise(slot, "advance")

    def release(self, slot: int) -> None:
        self._raise(slot, "release")

    def _raise(self, slot: int, where: str) -> None:
        if self.fault[slot] == where:
            raise RuntimeError(f"boom in {where}")


class Unmakable(LogitsProcessor):
    def __init__(self) -> None:
        raise RuntimeError("boom in the constructor")

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None: ...

    def apply(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        return logits


class Witness(EventListener):
    """Keeps what it hears in ``heard``; a test empties that first."""

    heard: ClassVar[list[tuple[Any, ...]]] = []

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        self.heard.append(("admitted", request_id, prompt_tokens))

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        self.heard.append(("finished", request_id, index, reason, output_tokens))

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        self.heard.append(("completed", request_id, metrics.decode is not None))

    def step(self, stats: StepStats) -> None:
        self.heard.append(("step", stats.num_rows, stats.num_tokens, stats.running))


class Aborter(EventListener):
    """At the end of a choice, ends every other request: from within the step."""

    target: ClassVar[list[Callable[[], None]]] = []

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        while self.target:
            self.target.pop()()


class Grumpy(EventListener):
    calls: ClassVar[list[str]] = []

    def step(self, stats: StepStats) -> None:
        self.calls.append("step")
        raise RuntimeError("boom in a listener")


class UnmakableListener(EventListener):
    def __init__(self) -> None:
        raise ValueError("boom in the constructor")


class Plugin:
    """Registers the classes of this module that it is given."""

    def __init__(self, *classes: type) -> None:
        self._classes = classes

    @hookimpl
    def kvpage_logits_processors(self) -> list[LogitsProcessorRecord]:
        return [
            LogitsProcessorRecord(name=c.__name__.lower(), factory=f"{SELF}:{c.__name__}")
            for c in self._classes
            if issubclass(c, LogitsProcessor)
        ]

    @hookimpl
    def kvpage_event_listeners(self) -> list[EventListenerRecord]:
        return [
            EventListenerRecord(name=c.__name__.lower(), factory=f"{SELF}:{c.__name__}")
            for c in self._classes
            if issubclass(c, EventListener)
        ]


def registry(*classes: type) -> PluginRegistry:
    return PluginRegistry(plugins=[Plugin(*classes)], entry_points=False, strict=True)


def counting(start: int, **changes: Any) -> SamplingParams:
    return GREEDY.clone(logits_processors=["countup"], extra_args={"start": start}, **changes)


def test_a_processor_changes_only_the_requests_that_name_it(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(CountUp))
    plain, counted, other = engine.generate([[9], [9], [9]], [GREEDY, counting(40), counting(80)])
    assert counted.outputs[0].token_ids == [40, 41, 42, 43, 44, 45]
    assert other.outputs[0].token_ids == [80, 81, 82, 83, 84, 85]
    assert plain.outputs[0].token_ids == make_engine().generate([9], GREEDY)[0].outputs[0].token_ids


def test_a_processor_follows_forks_preemptions_and_few_slots(make_engine: MakeEngine) -> None:
    expected = list(range(40, 80))
    for options in ({"num_kv_blocks": 14, "block_size": 4}, {"max_num_seqs": 2}, {}):
        engine = make_engine(plugins=registry(CountUp), **options)
        params = counting(40, n=3, temperature=1.0, max_tokens=40)
        (output,) = engine.generate([9, 8, 7], params)
        assert [choice.token_ids for choice in output.outputs] == [expected] * 3
    assert engine.stats().forks == 2


@pytest.mark.parametrize("where", ["admit", "apply", "advance"])
def test_a_processor_that_raises_ends_its_request_alone(make_engine: MakeEngine, where: str) -> None:
    engine = make_engine(plugins=registry(Faulty, CountUp))
    fine = [engine.submit([9], counting(40)), engine.submit([8], GREEDY)]
    faulty = engine.submit([7], GREEDY.clone(logits_processors=["faulty"], extra_args={"in": where}))
    several = engine.submit(
        [7, 7], GREEDY.clone(n=3, temperature=1.0, logits_processors=["faulty"], extra_args={"in": where})
    )
    for handle in (faulty, several):
        with pytest.raises(RequestError, match=f"boom in {where}"):
            handle.result()
        assert {choice.finish_reason for choice in handle.output.outputs} == {"error"}
        assert sum(event.finish_reason is not None for event in handle.events()) == len(handle.output.outputs)
    assert fine[0].result().outputs[0].token_ids == [40, 41, 42, 43, 44, 45]
    assert fine[1].result().outputs[0].finish_reason == "length"


def test_a_processor_that_fails_to_release_harms_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(Faulty), max_num_seqs=1)
    params = GREEDY.clone(logits_processors=["faulty"], extra_args={"in": "release"})
    outputs = engine.generate([[7], [8]], params)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length"]


def test_a_processor_that_cannot_be_made_ends_the_request_that_named_it(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(Unmakable))
    with pytest.raises(RequestError, match="boom in the constructor"):
        engine.generate([7], GREEDY.clone(logits_processors=["unmakable"]))
    assert engine.generate([7], GREEDY)


def test_a_listener_hears_the_life_of_a_request(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(Witness))
    Witness.heard.clear()
    engine.submit([9, 8, 7], GREEDY.clone(max_tokens=3), request_id="r").result()
    assert Witness.heard == [
        ("admitted", "r", 3),
        ("step", 1, 3, 1),
        ("step", 1, 1, 1),
        ("finished", "r", 0, "length", 3),
        ("completed", "r", True),
        ("step", 1, 1, 0),
    ]
    Witness.heard.clear()
    engine.submit([9], GREEDY, request_id="gone").cancel()
    assert ("finished", "gone", 0, "abort", 0) in Witness.heard
    assert ("completed", "gone", False) in Witness.heard


def test_a_listener_hears_of_every_choice_that_ends_in_error(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(Witness, Faulty))
    params = GREEDY.clone(n=2, temperature=1.0, logits_processors=["faulty"], extra_args={"in": "apply"})
    Witness.heard.clear()
    with pytest.raises(RequestError):
        engine.submit([9], params, request_id="r").result()
    ends = [event for event in Witness.heard if event[0] in ("finished", "completed")]
    assert ends == [
        ("finished", "r", 0, "error", 0),
        ("finished", "r", 1, "error", 0),
        ("completed", "r", False),
    ]


def test_a_listener_that_raises_is_dropped_and_logged(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    Grumpy.calls.clear()
    Witness.heard.clear()
    engine = make_engine(plugins=registry(Grumpy, Witness))
    (output,) = engine.generate([9], GREEDY)
    assert output.outputs[0].finish_reason == "length"
    assert Grumpy.calls == ["step"]
    assert sum(event[0] == "step" for event in Witness.heard) == 6
    assert "boom in a listener" in caplog.text


def test_a_listener_may_end_requests_from_within_a_step(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=registry(Aborter))
    first = engine.submit([9], GREEDY.clone(max_tokens=2))
    others = [engine.submit([8], GREEDY.clone(n=n, temperature=1.0)) for n in (1, 3)]
    Aborter.target[:] = [handle.cancel for handle in others]
    assert first.result().outputs[0].finish_reason == "length"
    for handle in others:
        assert {choice.finish_reason for choice in handle.result().outputs} == {"abort"}


def test_a_listener_that_cannot_be_made_names_its_plugin(tiny: Any) -> None:
    with pytest.raises(PluginError, match=r"unmakablelistener.*boom in the constructor"):
        Engine(tiny, plugins=registry(UnmakableListener))
