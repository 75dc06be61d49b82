"""The order in which a listener hears of a request, through preemption, forks, prefix hits, aborts and faults."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from engine_state import MakeEngine

from kvpage import Engine, PluginRegistry, RequestError, SamplingParams, hookimpl
from kvpage.api.events import EventListener, StepStats
from kvpage.api.records import EventListenerRecord
from kvpage.engine.stats import Listeners
from kvpage.outputs import FinishReason, RequestMetrics

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


class Recorder(EventListener):
    """Everything it hears, as tuples."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        self.heard.append(("admitted", request_id, prompt_tokens))

    def scheduled(self, request_id: str, index: int, cached_tokens: int) -> None:
        self.heard.append(("scheduled", request_id, index, cached_tokens))

    def preempted(self, request_id: str, index: int) -> None:
        self.heard.append(("preempted", request_id, index))

    def token(self, request_id: str, index: int, token_ids: tuple[int, ...]) -> None:
        self.heard.append(("token", request_id, index, token_ids))

    def finished(self, request_id: str, index: int, reason: FinishReason, output_tokens: int) -> None:
        self.heard.append(("finished", request_id, index, reason, output_tokens))

    def completed(self, request_id: str, metrics: RequestMetrics) -> None:
        self.heard.append(("completed", request_id))

    def step(self, stats: StepStats) -> None:
        self.heard.append(("step", stats.step))


def recorder_of(engine: Engine) -> Recorder:
    recorder = Recorder()
    engine._core.listeners.add(recorder)
    return recorder


def follow(heard: list[tuple[Any, ...]]) -> dict[tuple[str, int], list[int]]:
    """Hold what was heard against the order that ``EventListener`` documents; the tokens of each choice."""
    runs: dict[tuple[str, int], bool] = {}
    tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
    ended: set[tuple[str, int]] = set()
    open_requests: set[str] = set()
    for event, *values in heard:
        if event == "step":
            continue
        request_id = values[0]
        if event == "admitted":
            assert request_id not in open_requests
            open_requests.add(request_id)
            continue
        assert request_id in open_requests, f"{event} of {request_id}, which is not admitted"
        if event == "completed":
            open_requests.remove(request_id)
            assert not any(name == request_id and running for (name, _), running in runs.items())
            continue
        choice = (request_id, values[1])
        assert choice not in ended, f"{event} of {choice}, which has ended"
        if event == "scheduled":
            assert not runs.get(choice)
            runs[choice] = True
        elif event == "preempted":
            assert runs[choice]
            runs[choice] = False
        elif event == "token":
            assert runs[choice]
            tokens[choice] += values[2]
        else:
            assert values[3] == len(tokens[choice])
            ended.add(choice)
            runs[choice] = False
    assert not open_requests
    return tokens


def test_one_request_from_admission_to_completion(make_engine: MakeEngine) -> None:
    engine = make_engine()
    recorder = recorder_of(engine)
    output = engine.submit([9, 8, 7], GREEDY.clone(max_tokens=2), request_id="r").result()
    first, second = output.outputs[0].token_ids
    assert recorder.heard == [
        ("admitted", "r", 3),
        ("scheduled", "r", 0, 0),
        ("token", "r", 0, (first,)),
        ("step", 0),
        ("token", "r", 0, (second,)),
        ("finished", "r", 0, "length", 2),
        ("completed", "r"),
        ("step", 1),
    ]


def test_cached_tokens_are_prefix_hits_and_what_choices_share(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=16)
    prompt = list(range(3, 43))
    engine.generate([{"prompt_token_ids": prompt}], GREEDY)
    recorder = recorder_of(engine)
    engine.submit(prompt, GREEDY.clone(n=2, temperature=1.0), request_id="r").result()
    assert [event for event in recorder.heard if event[0] == "scheduled"] == [
        ("scheduled", "r", 0, 32),
        ("scheduled", "r", 1, 40),
    ]


@pytest.mark.parametrize("blocks", [9, 14, 64])
def test_every_choice_has_its_events_in_order_whatever_happens_to_it(
    make_engine: MakeEngine, blocks: int
) -> None:
    engine = make_engine(num_kv_blocks=blocks, block_size=4, max_num_seqs=4, max_model_len=32)
    recorder = recorder_of(engine)
    handles = [
        engine.submit(
            list(range(5, 10 + seed)),
            GREEDY.clone(max_tokens=12, n=n, temperature=1.0, seed=seed),
            request_id=f"r{seed}",
        )
        for seed, n in enumerate([1, 2, 1, 3, 1])
    ]
    for step in range(400):
        if step == 5:
            handles[3].cancel()
        if not engine._core.has_work:
            break
        engine.step()
    outputs = [handle.result() for handle in handles]
    tokens = follow(recorder.heard)
    preemptions = sum(event[0] == "preempted" for event in recorder.heard)
    assert preemptions == engine.stats().preemptions
    assert (preemptions > 0) == (blocks < 64)
    for output in outputs:
        for choice in output.outputs:
            assert tokens[output.request_id, choice.index] == list(choice.token_ids)


def test_a_request_that_fails_ends_once_a_choice(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    recorder = recorder_of(engine)
    handle = engine.submit([9, 8], GREEDY.clone(n=2, temperature=1.0), request_id="r")
    choice = engine._core.states["r"].choices[1]

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no text")

    monkeypatch.setattr(type(choice), "add", fail)
    with pytest.raises(RequestError, match="no text"):
        handle.result()
    assert [event[0] for event in recorder.heard].count("finished") == 2
    assert recorder.heard.index(("completed", "r")) > max(
        i for i, event in enumerate(recorder.heard) if event[0] == "finished"
    )


def test_an_interrupted_step_preempts_all_that_ran(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    recorder = recorder_of(engine)
    handle = engine.submit([9, 8], GREEDY, request_id="r")
    engine.step()
    executor = engine._core._executor

    def interrupt(plan: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    handle.result()
    follow(recorder.heard)
    moves = [event[0] for event in recorder.heard if event[0] in ("scheduled", "preempted")]
    assert moves == ["scheduled", "preempted", "scheduled"]


def test_what_a_listener_does_not_override_is_not_told() -> None:
    class Quiet(EventListener):
        def step(self, stats: StepStats) -> None: ...

    class Child(Quiet):
        def token(self, request_id: str, index: int, token_ids: tuple[int, ...]) -> None: ...

    listeners = Listeners({"quiet": Quiet()})
    assert [listeners.hears(event) for event in ("step", "token", "scheduled")] == [True, False, False]
    listeners.add(Child())
    assert [listeners.hears(event) for event in ("step", "token", "scheduled")] == [True, True, False]


class RecorderPlugin:
    @hookimpl
    def kvpage_event_listeners(self) -> list[EventListenerRecord]:
        return [EventListenerRecord(name="recorder", factory=f"{__name__}:Recorder")]


def test_a_registered_listener_hears_the_same(make_engine: MakeEngine) -> None:
    engine = make_engine(plugins=PluginRegistry(plugins=[RecorderPlugin()], entry_points=False))
    assert engine._core.listeners.hears("preempted")
    engine.generate([{"prompt_token_ids": [7, 8]}], GREEDY)
