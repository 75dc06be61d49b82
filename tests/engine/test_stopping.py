"""When a choice ends, why, and what its text shows of that."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from engine_state import MakeEngine

from kvpage import CompletionOutput, Engine, SamplingParams, TokenEvent
from tiny_checkpoint import EOS, write_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPT = "The block pool"


def run(engine: Engine, params: SamplingParams) -> CompletionOutput:
    return engine.generate(PROMPT, params)[0].outputs[0]


@pytest.fixture
def plain(engine: Engine) -> CompletionOutput:
    """What is generated when nothing stops it."""
    return run(engine, GREEDY)


def first_use(tokens: list[int], earliest: int) -> int:
    """Index of a token at or after ``earliest`` that was not generated before."""
    return next(i for i in range(earliest, len(tokens)) if tokens[i] not in tokens[:i])


def test_max_tokens_ends_with_length(plain: CompletionOutput) -> None:
    assert (plain.finish_reason, plain.stop_reason, len(plain.token_ids)) == ("length", None, 40)


def test_without_max_tokens_the_context_is_filled(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=48)
    (output,) = engine.generate(PROMPT, GREEDY.clone(max_tokens=None))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 48
    assert output.outputs[0].finish_reason == "length"


def test_without_max_tokens_the_pool_is_filled(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=5, block_size=4)
    (output,) = engine.generate(PROMPT, GREEDY.clone(max_tokens=None))
    # The last token is never computed, so it needs no KV.
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 21


def test_a_stop_token_ends_with_its_id_and_stays_out_of_the_text(
    engine: Engine, plain: CompletionOutput
) -> None:
    index = first_use(plain.token_ids, 5)
    token = plain.token_ids[index]
    output = run(engine, GREEDY.clone(stop_token_ids=[token]))
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.token_ids == plain.token_ids[: index + 1]
    shorter = run(engine, GREEDY.clone(max_tokens=index))
    assert output.text == shorter.text


def test_a_stop_token_is_shown_where_stops_are_to_be_included(
    engine: Engine, plain: CompletionOutput
) -> None:
    index = first_use(plain.token_ids, 5)
    params = GREEDY.clone(stop_token_ids=[plain.token_ids[index]], include_stop_str_in_output=True)
    assert run(engine, params).text == run(engine, GREEDY.clone(max_tokens=index + 1)).text


def test_a_stop_token_goes_before_a_stop_string_that_it_completes(
    engine: Engine, plain: CompletionOutput
) -> None:
    assert engine.tokenizer is not None
    index = next(
        i for i in range(4, 30)
        if plain.token_ids[i] not in plain.token_ids[:i]
        and (text := engine.tokenizer.token_text(plain.token_ids[i])).isascii()
        and text not in run(engine, GREEDY.clone(max_tokens=i)).text
    )  # fmt: skip
    token = plain.token_ids[index]
    params = GREEDY.clone(stop_token_ids=[token], stop=engine.tokenizer.token_text(token), max_tokens=40)
    hidden, shown = run(engine, params), run(engine, params.clone(include_stop_str_in_output=True))
    assert (hidden.stop_reason, shown.stop_reason) == (token, token)
    assert shown.text == hidden.text + engine.tokenizer.token_text(token)


@pytest.fixture
def ending(plain: CompletionOutput, tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint whose end-of-sequence token is one that is generated, and where."""
    index = first_use(plain.token_ids, 5)
    return write_checkpoint(tmp_path / "ending", eos_token_id=plain.token_ids[index]), index


def test_the_models_end_has_no_stop_reason(
    make_engine: MakeEngine, plain: CompletionOutput, ending: tuple[Path, int]
) -> None:
    folder, index = ending
    engine = make_engine(folder)
    output = run(engine, GREEDY.clone(ignore_eos=False))
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.token_ids == plain.token_ids[: index + 1]
    assert run(engine, GREEDY).token_ids == plain.token_ids, "ignore_eos"


def test_min_tokens_puts_the_end_off(
    make_engine: MakeEngine, plain: CompletionOutput, ending: tuple[Path, int]
) -> None:
    folder, index = ending
    output = run(make_engine(folder), GREEDY.clone(ignore_eos=False, min_tokens=index + 10))
    assert len(output.token_ids) >= index + 10
    assert plain.token_ids[index] not in output.token_ids[: index + 10]


def test_generation_config_names_further_ends(
    make_engine: MakeEngine, plain: CompletionOutput, tmp_path: Path
) -> None:
    index = first_use(plain.token_ids, 5)
    folder = write_checkpoint(tmp_path / "ends")
    text = f'{{"eos_token_id": [{EOS}, {plain.token_ids[index]}]}}'
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    output = run(make_engine(folder), GREEDY.clone(ignore_eos=False))
    assert (output.finish_reason, len(output.token_ids)) == ("stop", index + 1)


def stops_of(text: str) -> list[str]:
    """Pieces of a text of 1, 2, 3 and 7 characters that occur in it first where they were cut."""
    found = []
    for length in (1, 2, 3, 7):
        start = next(i for i in range(6, len(text) - length) if text.find(text[i : i + length]) == i)
        found.append(text[start : start + length])
    return found


def test_text_is_cut_before_a_stop_string(engine: Engine, plain: CompletionOutput) -> None:
    for stop in stops_of(plain.text):
        output = run(engine, GREEDY.clone(stop=stop))
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == plain.text[: plain.text.index(stop)]
        included = run(engine, GREEDY.clone(stop=stop, include_stop_str_in_output=True))
        assert included.text == output.text + stop


def test_the_stop_string_that_is_complete_first_wins(engine: Engine, plain: CompletionOutput) -> None:
    stops = stops_of(plain.text)
    ends = {stop: plain.text.index(stop) + len(stop) for stop in stops}
    first = min(stops, key=lambda stop: ends[stop])
    output = run(engine, GREEDY.clone(stop=["never there", *stops]))
    assert output.stop_reason == first


def test_a_stream_never_shows_a_part_of_a_stop_string(engine: Engine, plain: CompletionOutput) -> None:
    for stop in stops_of(plain.text):
        shown = ""
        for event in engine.stream(PROMPT, GREEDY.clone(stop=stop)):
            shown += event.delta
            assert plain.text[: plain.text.index(stop)].startswith(shown)
        assert shown == plain.text[: plain.text.index(stop)]


def test_text_held_back_for_a_stop_string_is_shown_when_it_did_not_come(
    engine: Engine, plain: CompletionOutput
) -> None:
    params = GREEDY.clone(stop=plain.text[-3:] + "never there")
    events: list[TokenEvent] = list(engine.stream(PROMPT, params))
    assert "".join(event.delta for event in events) == plain.text
    assert events[-1].finish_reason == "length"
    assert sum(event.finish_reason is not None for event in events) == 1


def test_a_stop_string_in_the_very_last_token_is_a_stop(engine: Engine, plain: CompletionOutput) -> None:
    for count in range(8, 30):
        shorter, longer = (run(engine, GREEDY.clone(max_tokens=n)).text for n in (count - 1, count))
        gained = longer[len(shorter) :]
        if longer.startswith(shorter) and gained and gained not in shorter:
            break
    output = run(engine, GREEDY.clone(max_tokens=count, stop=gained))
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", gained, shorter)
    assert len(output.token_ids) == count


def test_stop_strings_do_not_count_before_min_tokens(engine: Engine, plain: CompletionOutput) -> None:
    stop = stops_of(plain.text)[0]
    early = run(engine, GREEDY.clone(stop=stop))
    late = run(engine, GREEDY.clone(stop=stop, min_tokens=len(early.token_ids) + 1))
    assert len(late.token_ids) > len(early.token_ids)
    assert late.text.startswith(early.text + stop)


def test_a_timeout_ends_a_running_request_with_what_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine()
    handle = engine.submit(PROMPT, GREEDY.clone(max_tokens=400, timeout=0.05))
    engine.step()
    engine.step()
    time.sleep(0.06)
    output = handle.result()
    choice = output.outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("length", "timeout")
    assert len(choice.token_ids) == 2


def test_a_timeout_ends_a_waiting_request(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    running = engine.submit(PROMPT, GREEDY)
    waiting = engine.submit(PROMPT, GREEDY.clone(timeout=0.01, n=1))
    engine.step()
    time.sleep(0.02)
    choice = waiting.result().outputs[0]
    assert (choice.finish_reason, choice.stop_reason, choice.token_ids) == ("length", "timeout", [])
    assert len(running.result().outputs[0].token_ids) == 40
