"""What a failed step, a failed text and an interrupt leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_state import MakeEngine, assert_empty

from kvpage import Engine, EngineDeadError, RequestError, SamplingParams
from kvpage.text.detokenizer import Detokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 60))


class Sabotage:
    """Raises ``error`` in the ``count``-th use of a method, before or after it did its work."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        error: BaseException,
        count: int = 1,
        *,
        after: bool = False,
    ) -> None:
        original, self.left = getattr(owner, name), count

        def replaced(*args: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not after:
                raise error
            result = original(*args, **keywords)
            if self.left == 0:
                raise error
            return result

        monkeypatch.setattr(owner, name, replaced)


@pytest.mark.parametrize("place", ["executor", "schedule", "commit"])
def test_a_failed_step_ends_the_engine_and_every_request(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = Engine(tiny)
    core = engine._core
    owner, name = {
        "executor": (core._executor, "submit"), "schedule": (core.scheduler, "schedule"),
        "commit": (core.scheduler, "commit"),
    }[place]  # fmt: skip
    Sabotage(monkeypatch, owner, name, ValueError("boom"), count=3, after=place == "commit")
    handles = [engine.submit(PROMPT, GREEDY.clone(n=n, temperature=1.0)) for n in (1, 3)]
    engine.step()
    engine.step()
    with pytest.raises(EngineDeadError, match="ValueError: boom") as caught:
        engine.step()
    assert isinstance(caught.value.__cause__, ValueError)
    for handle in handles:
        assert handle.done
        assert {choice.finish_reason for choice in handle.output.outputs} == {"error"}
        assert all(choice.token_ids for choice in handle.output.outputs), "what was generated is kept"
        with pytest.raises(EngineDeadError, match="boom"):
            handle.result()
    for use in (engine.step, lambda: engine.generate("x")):
        with pytest.raises(EngineDeadError, match="boom"):
            use()
    engine.close()
    assert engine.stats().used_blocks == 0


@pytest.mark.parametrize("after", [False, True], ids=["before the model ran", "after it"])
def test_an_interrupted_generate_leaves_the_engine_usable(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    expected = [o.outputs[0].token_ids for o in make_engine().generate([PROMPT, PROMPT[3:]], GREEDY)]
    engine = make_engine(block_size=4)
    for count in (1, 3):
        with monkeypatch.context() as patch:
            Sabotage(patch, engine._core._executor, "submit", KeyboardInterrupt(), count=count, after=after)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([PROMPT, PROMPT[3:]], GREEDY)
        assert_empty(engine)
        assert [o.outputs[0].token_ids for o in engine.generate([PROMPT, PROMPT[3:]], GREEDY)] == expected


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_interrupted_step_is_computed_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    params = GREEDY.clone(n=3, temperature=1.0, seed=4, prompt_logprobs=1, logprobs=1)
    (expected,) = make_engine().generate(PROMPT, params)
    engine = make_engine(max_num_batched_tokens=16)
    handle = engine.submit(PROMPT, params)
    Sabotage(monkeypatch, engine._core._executor, "submit", KeyboardInterrupt(), count=count, after=True)
    with pytest.raises(KeyboardInterrupt):
        handle.result()
    output = handle.result()
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPT)


def test_an_interrupt_between_tokens_ends_requests_and_not_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    (expected,) = engine.generate("The", GREEDY)
    other = engine.submit("Paged", GREEDY)
    with monkeypatch.context() as patch:
        Sabotage(patch, Detokenizer, "push", KeyboardInterrupt(), count=3, after=True)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["The", "The"], GREEDY)
    assert_empty(engine)
    with pytest.raises(RequestError, match="interrupted"):
        other.result()
    assert engine.generate("The", GREEDY)[0].outputs[0].token_ids == expected.outputs[0].token_ids


def test_an_interrupt_within_the_scheduler_ends_the_engine_in_order(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny)
    Sabotage(monkeypatch, engine._core.scheduler, "commit", KeyboardInterrupt(), count=2, after=True)
    handle = engine.submit("The", GREEDY)
    with pytest.raises(KeyboardInterrupt):
        handle.result()
    with pytest.raises(EngineDeadError, match="KeyboardInterrupt"):
        handle.result()
    engine.close()
    assert engine.stats().used_blocks == 0


def test_a_text_that_cannot_be_decoded_ends_its_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    broken = engine.submit("The", GREEDY.clone(n=3, temperature=1.0, seed=1))
    fine = engine.submit("The", GREEDY)
    detokenizer = broken._state.choices[1]._detokenizer
    for name in ("push", "flush"):
        original = getattr(Detokenizer, name)

        def fails(self: Detokenizer, *ids: Any, original: Any = original) -> str:
            if self is detokenizer:
                raise ZeroDivisionError("boom")
            return str(original(self, *ids))

        monkeypatch.setattr(Detokenizer, name, fails)
    with pytest.raises(RequestError, match="ZeroDivisionError: boom"):
        broken.result()
    assert [choice.finish_reason for choice in broken.output.outputs] == ["error"] * 3
    assert fine.result().outputs[0].finish_reason == "length"


def test_a_stream_that_the_garbage_collector_closes_within_a_step_ends_after_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(block_size=4)
    handles = [engine.submit(PROMPT, GREEDY) for _ in range(3)]
    admit = engine._core.blocks.admit

    def collects(*args: Any, **keywords: Any) -> Any:
        handles[0].cancel()
        handles[1].cancel()
        return admit(*args, **keywords)

    monkeypatch.setattr(engine._core.blocks, "admit", collects)
    assert handles[2].result().outputs[0].finish_reason == "length"
    assert [handle.result().outputs[0].finish_reason for handle in handles[:2]] == ["abort"] * 2
