"""Engine: prompts go in, whole outputs, streams and handles come out."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from pathlib import Path

import pytest
from engine_state import MakeEngine

from kvpage import Engine, EngineDeadError, RequestError, RequestOutput, SamplingParams
from tiny_checkpoint import write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The block pool", "Every request ends in exactly one", "Paged", "hands out blocks, and the"]


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_results_come_in_the_order_of_the_prompts_and_carry_them(engine: Engine) -> None:
    limits = [5, 1, 9, 3]
    outputs = engine.generate(PROMPTS, [GREEDY.clone(max_tokens=n) for n in limits])
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(tokens_of(output)) for output in outputs] == limits
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert len({output.request_id for output in outputs}) == len(PROMPTS)


def test_text_ids_and_mappings_of_the_same_prompt_give_the_same_tokens(engine: Engine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(PROMPTS[0])
    forms = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    outputs = engine.generate(forms, GREEDY)  # type: ignore[arg-type]
    assert len({tuple(tokens_of(output)) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == [PROMPTS[0], None, PROMPTS[0], None]
    assert all(output.prompt_token_ids == ids for output in outputs)


def test_one_prompt_needs_no_list(engine: Engine) -> None:
    (from_text,) = engine.generate(PROMPTS[0], GREEDY)
    (from_ids,) = engine.generate(from_text.prompt_token_ids, GREEDY)
    assert tokens_of(from_ids) == tokens_of(from_text)


def test_no_prompts_give_no_outputs(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_text_is_what_the_tokenizer_makes_of_the_tokens(engine: Engine) -> None:
    (output,) = engine.generate("The", GREEDY.clone(max_tokens=40))
    assert engine.tokenizer is not None
    prompt = list(output.prompt_token_ids)
    whole = engine.tokenizer.decode(prompt + tokens_of(output))
    assert whole == engine.tokenizer.decode(prompt) + output.outputs[0].text


def test_text_stays_empty_where_it_was_not_asked_for(engine: Engine) -> None:
    (output,) = engine.generate("The", GREEDY.clone(detokenize=False))
    assert output.outputs[0].text == ""
    assert len(tokens_of(output)) == 12


def test_tokens_that_the_tokenizer_does_not_know_have_no_text(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "padded", vocab_size=512)
    engine = make_engine(folder, max_logprobs=-1)
    params = GREEDY.clone(max_tokens=40, logprobs=-1, temperature=1.0, seed=2)
    (output,) = engine.generate("The", params)
    unknown = [token for token in output.outputs[0].token_ids if token >= 380]
    assert unknown, "the model gave some"
    (known,) = engine.generate("The", params.clone(allowed_token_ids=range(380, 512)))
    assert known.outputs[0].text == ""


def test_a_chat_is_the_rendered_template_without_a_second_bos(engine: Engine) -> None:
    messages = [{"role": "user", "content": "blocks?"}]
    (output,) = engine.chat(messages, GREEDY)
    assert output.prompt == engine.render_chat(messages) == "<s><|user|>blocks?<|assistant|>"
    assert list(output.prompt_token_ids).count(1) == 1
    outputs = engine.chat([messages, messages], GREEDY)
    assert [tokens_of(o) for o in outputs] == [tokens_of(output)] * 2


def test_template_options_reach_the_template(engine: Engine) -> None:
    messages = [{"role": "user", "content": "blocks?"}]
    (output,) = engine.chat(messages, GREEDY, add_generation_prompt=False)
    assert output.prompt == "<s><|user|>blocks?"


def test_deltas_of_a_stream_concatenate_to_the_text(engine: Engine) -> None:
    for prompt in PROMPTS:
        (whole,) = engine.generate(prompt, GREEDY)
        events = list(engine.stream(prompt, GREEDY))
        assert "".join(event.delta for event in events) == whole.outputs[0].text
        assert [token for event in events for token in event.token_ids] == tokens_of(whole)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]


def test_a_chat_streams_like_it_answers(engine: Engine) -> None:
    messages = [{"role": "user", "content": "blocks?"}]
    (whole,) = engine.chat(messages, GREEDY)
    assert "".join(e.delta for e in engine.stream_chat(messages, GREEDY)) == whole.outputs[0].text


def test_each_choice_of_a_stream_has_exactly_one_terminal_event(engine: Engine) -> None:
    params = SamplingParams(n=5, max_tokens=30, temperature=1.5, seed=3, stop=["e", "a"])
    events = list(engine.stream("The", params))
    ends = [event.index for event in events if event.finish_reason is not None]
    assert sorted(ends) == [0, 1, 2, 3, 4]
    for index in range(5):
        last = [event for event in events if event.index == index][-1]
        assert last.finish_reason is not None


def test_leaving_a_stream_cancels_its_request(engine: Engine) -> None:
    for event in engine.stream("The", GREEDY.clone(max_tokens=200)):
        assert event.finish_reason is None
        break
    assert engine.stats().running == 0


def test_the_caller_drives_submitted_requests_step_by_step(engine: Engine) -> None:
    handle = engine.submit("The block", GREEDY)
    assert not handle.done
    assert engine.stats().waiting == 1
    seen = []
    while engine.step():
        seen.append(len(handle.output.outputs[0].token_ids))
    assert seen == list(range(1, 12))
    assert handle.done
    assert handle.result() is handle.output
    assert engine.step() is False


def test_unread_events_are_merged(engine: Engine) -> None:
    handle = engine.submit("The block", GREEDY)
    handle.result()
    (event,) = handle.events()
    assert list(event.token_ids) == tokens_of(handle.output)
    assert event.delta == handle.output.outputs[0].text
    assert handle.events() == []


def test_a_cancelled_request_keeps_what_it_generated(engine: Engine) -> None:
    (whole,) = engine.generate("The block", GREEDY)
    handle = engine.submit("The block", GREEDY)
    for _ in range(4):
        engine.step()
    handle.cancel()
    handle.cancel()
    output = handle.result()
    assert output.outputs[0].finish_reason == "abort"
    assert tokens_of(output) == tokens_of(whole)[:4]
    assert output.outputs[0].text


def test_a_request_cancelled_before_its_first_step_ends_too(engine: Engine) -> None:
    handle = engine.submit("The block", GREEDY.clone(n=1))
    engine.abort(handle.request_id)
    assert handle.result().outputs[0].finish_reason == "abort"
    assert handle.output.metrics.queued is None


def test_cancelling_an_ended_request_spares_a_new_one_of_the_same_id(engine: Engine) -> None:
    old = engine.submit("The block", GREEDY, request_id="mine")
    old.result()
    new = engine.submit("The block", GREEDY, request_id="mine")
    old.cancel()
    assert new.result().outputs[0].finish_reason == "length"


def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: Engine) -> None:
    first = engine.submit("The block", GREEDY, request_id="mine")
    with pytest.raises(RequestError, match="'mine' is in use") as caught:
        engine.submit("Paged", GREEDY, request_id="mine")
    assert caught.value.param == "request_id"
    assert first.result().outputs[0].finish_reason == "length"


def test_aborting_an_unknown_id_does_nothing(engine: Engine) -> None:
    handle = engine.submit("Paged", GREEDY)
    engine.abort("never seen")
    assert handle.result().outputs[0].finish_reason == "length"


def test_metrics_tell_what_a_request_cost(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, block_size=4)
    outputs = engine.generate(["The block pool hands out blocks"] * 2, GREEDY)
    first, second = (output.metrics for output in outputs)
    for metrics in (first, second):
        assert metrics.arrival_time > 0
        assert metrics.queued is not None
        assert metrics.queued >= 0
        assert metrics.prefill is not None
        assert metrics.prefill > 0
        assert metrics.decode is not None
        assert metrics.decode > 0
        assert metrics.time_to_first_token == metrics.queued + metrics.prefill
    assert second.queued is not None
    assert first.decode is not None
    assert second.queued >= first.decode, "it waited for the first to end"
    assert first.cached_tokens == 0
    prompt = len(outputs[1].prompt_token_ids)
    assert outputs[1].num_cached_tokens == second.cached_tokens == (prompt - 1) // 4 * 4 > 0


def test_preemptions_are_counted_and_change_no_token(make_engine: MakeEngine) -> None:
    params = GREEDY.clone(max_tokens=40)
    alone = make_engine().generate(PROMPTS, params)
    engine = make_engine(num_kv_blocks=16, block_size=4, enable_prefix_caching=False)
    squeezed = engine.generate(PROMPTS, params)
    assert [tokens_of(o) for o in squeezed] == [tokens_of(o) for o in alone]
    assert sum(o.metrics.preemptions for o in squeezed) == engine.stats().preemptions > 0


def test_stats_count_what_happens(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4, num_kv_blocks=100)
    handle = engine.submit("The block pool hands out blocks", GREEDY)
    engine.step()
    running = engine.stats()
    length = len(handle.output.prompt_token_ids)
    assert (running.running, running.waiting, running.total_blocks) == (1, 0, 100)
    assert running.used_blocks == -(-length // 4)
    assert running.free_blocks + running.used_blocks == 100
    assert 0 < running.kv_usage < 1
    handle.result()
    done = engine.stats()
    assert (done.prompt_tokens, done.generated_tokens, done.finished_requests) == (length, 12, 1)
    assert done.steps == 12
    assert done.cached_blocks > 0


def test_the_block_map_shows_who_holds_what(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4, num_kv_blocks=32)
    handle = engine.submit("The block pool hands out blocks", GREEDY, request_id="shown")
    engine.step()
    block_map = engine.inspect()
    assert "shown" in block_map.to_text()
    assert block_map.to_svg().startswith("<svg")
    (sequence,) = block_map.sequences
    assert sequence.request_id == "shown"
    handle.result()


def test_a_progress_bar_leaves_the_streams_of_the_host_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, out = Terminal(), sys.stdout
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    step = engine._core.step

    def watched() -> object:
        seen.append((sys.stdout is out, sys.stderr is terminal))
        return step()

    monkeypatch.setattr(engine._core, "step", watched)
    quiet = engine.generate(PROMPTS, GREEDY, progress=False)
    assert terminal.getvalue() == ""
    shown = engine.generate(PROMPTS, GREEDY)
    assert "requests" in terminal.getvalue()
    assert set(seen) == {(True, True)}
    assert [tokens_of(o) for o in shown] == [tokens_of(o) for o in quiet]


def test_threads_take_turns_on_one_engine(engine: Engine) -> None:
    expected = [tokens_of(output) for output in engine.generate(PROMPTS, GREEDY)]
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = tokens_of(engine.generate(PROMPTS[index], GREEDY)[0])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == expected


def test_the_engine_works_inside_a_running_event_loop(engine: Engine) -> None:
    async def notebook_cell() -> list[RequestOutput]:
        return engine.generate(PROMPTS, GREEDY)

    assert len(asyncio.run(notebook_cell())) == len(PROMPTS)


def test_closing_ends_requests_and_is_idempotent(tiny: Path) -> None:
    engine = Engine(tiny)
    handle = engine.submit("The block", GREEDY)
    engine.step()
    engine.close()
    engine.close()
    assert handle.result().outputs[0].finish_reason == "abort"
    assert len(tokens_of(handle.output)) == 1
    for use in (engine.step, lambda: engine.submit("The"), lambda: engine.generate("The")):
        with pytest.raises(EngineDeadError, match="closed"):
            use()
    assert engine.stats().used_blocks == 0


def test_an_engine_is_closed_by_its_with_statement(tiny: Path) -> None:
    with Engine(tiny) as engine:
        engine.generate("The", GREEDY)
    with pytest.raises(EngineDeadError):
        engine.generate("The", GREEDY)


def test_a_result_awaited_while_another_thread_closes_the_engine_is_an_abort(tiny: Path) -> None:
    for _ in range(5):
        engine = Engine(tiny)
        handle = engine.submit("The", SamplingParams(max_tokens=None, ignore_eos=True))
        closer = threading.Timer(0.02, engine.close)
        closer.start()
        reasons = [choice.finish_reason for choice in handle.result().outputs]
        closer.join()
        assert reasons[0] in {"abort", "length"}


def test_vllm_options_for_what_is_missing_are_fine_where_they_ask_for_nothing(tiny: Path) -> None:
    with Engine(tiny, pipeline_parallel_size=1, enable_lora=False, speculative_config=None) as engine:
        assert len(engine.generate("The", GREEDY)) == 1


def test_engines_and_handles_say_what_they_are(tiny: Path) -> None:
    with Engine(tiny) as engine:
        handle = engine.submit("The", GREEDY)
        assert "open" in repr(engine)
        assert handle.request_id in repr(handle)
    assert "closed" in repr(engine)
