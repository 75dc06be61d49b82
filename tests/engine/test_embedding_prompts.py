"""Engine.embed: vectors of prompts, beside whatever else an engine does."""

from __future__ import annotations

import base64
import math
import pickle
import struct
from typing import Any

import pytest
from engine_state import MakeEngine

from kvpage import Engine, EngineDeadError, RequestError, SamplingParams
from kvpage.errors import TooLongError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(20, 60))


def test_one_vector_a_prompt_in_their_order(engine: Engine) -> None:
    texts = ["The block pool", "Paged", "Every request ends in exactly one"]
    together = engine.embed(texts)
    assert [output.prompt for output in together] == texts
    for text, output in zip(texts, together, strict=True):
        assert (output.finished, output.finish_reason) == (True, "stop")
        assert len(output.embedding) == 32
        assert math.hypot(*output.embedding) == pytest.approx(1.0, abs=1e-6)
        assert list(engine.embed(text)[0].embedding) == pytest.approx(list(output.embedding), abs=1e-6)
    assert engine.embed([]) == []


def test_a_vector_is_float32_that_goes_into_base64_as_it_is(engine: Engine) -> None:
    output = engine.embed([PROMPT], pooling="last")[0]
    decoded = base64.b64decode(base64.b64encode(output.embedding))
    assert struct.unpack(f"<{len(output.embedding)}f", decoded) == tuple(output.embedding)
    assert pickle.loads(pickle.dumps(output)) == output


def test_a_prompt_may_be_as_long_as_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=64, block_size=16, num_kv_blocks=4)
    prompt = [3 + i % 300 for i in range(64)]
    for pooling in ("mean", "last"):
        assert len(engine.embed([prompt], pooling=pooling)[0].embedding) == 32
    with pytest.raises(TooLongError, match="maximum context length is 64 tokens"):
        engine.embed([PROMPT, [*prompt, 5]])
    with pytest.raises(RequestError, match="at least 1 output token needs room"):
        engine.generate([prompt], GREEDY)


def test_embedding_does_not_change_what_is_generated_beside_it(make_engine: MakeEngine) -> None:
    alone = make_engine().generate([PROMPT], GREEDY)[0].outputs[0].token_ids
    engine = make_engine(max_num_batched_tokens=16)
    handle = engine.submit(PROMPT, GREEDY)
    engine.step()
    vector = engine.embed([PROMPT[5:]])[0].embedding
    assert handle.result().outputs[0].token_ids == alone
    assert list(make_engine().embed([PROMPT[5:]])[0].embedding) == pytest.approx(list(vector), abs=1e-6)


def test_the_last_position_uses_cached_blocks_and_the_mean_leaves_some(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=16)
    first = engine.embed([PROMPT], pooling="mean")[0]
    again = engine.embed([PROMPT], pooling="mean")[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 0)
    assert again.embedding == first.embedding
    hit = engine.embed([PROMPT], pooling="last")[0]
    assert hit.num_cached_tokens == 32
    assert engine.generate([PROMPT], GREEDY)[0].num_cached_tokens == 32
    assert engine.embed([PROMPT], pooling="last", cache_salt="tenant")[0].num_cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "keywords", "param"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([1, 10**6], {}, "prompt"),
        ("x", {"pooling": "max"}, "pooling"),
        ("x", {"normalize": None}, "normalize"),
        ("x", {"cache_salt": 5}, "cache_salt"),
        ("x", {"priority": ["high"]}, "priority"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_leaves_nothing(
    engine: Engine, prompt: Any, keywords: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as error:
        engine.embed([prompt], **keywords)
    assert error.value.param == param


def test_a_timeout_is_an_error_since_half_a_prompt_has_no_vector(engine: Engine) -> None:
    with pytest.raises(RequestError, match="not there after 1e-09 s") as error:
        engine.embed([PROMPT], timeout=1e-9)
    assert error.value.param == "timeout"


def test_a_closed_engine_embeds_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.close()
    with pytest.raises(EngineDeadError):
        engine.embed(["x"])


def test_a_failed_step_ends_it_with_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    monkeypatch.setattr(engine._core.scheduler, "commit", lambda plan, result: 1 / 0)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        engine.embed([PROMPT])


def test_queue_and_cost_are_told(engine: Engine) -> None:
    metrics = engine.embed([PROMPT])[0].metrics
    assert metrics.queued is not None
    assert metrics.prefill is not None
    assert metrics.decode is None
