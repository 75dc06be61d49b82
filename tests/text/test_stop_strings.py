"""Stop strings: found at once, shown never, whatever the deltas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpage.text.stops import StopStrings


def streamed(stops: Sequence[str], deltas: Sequence[str], *, include: bool = False) -> tuple[str, str | None]:
    search = StopStrings(stops, include_in_output=include)
    emitted = ""
    for delta in deltas:
        text, matched = search.push(delta)
        emitted += text
        if matched is not None:
            return emitted, matched
    return emitted + search.flush(), None


def looked_up(stops: Sequence[str], text: str, *, include: bool = False) -> tuple[str, str | None]:
    """The definition: look for every stop string after every character."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    deltas=st.lists(st.text("abc", max_size=4), max_size=12),
    include=st.booleans(),
)
def test_any_cut_into_deltas_gives_what_the_definition_says(
    stops: list[str], deltas: list[str], include: bool
) -> None:
    assert streamed(stops, deltas, include=include) == looked_up(stops, "".join(deltas), include=include)


@settings(max_examples=200, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    deltas=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_held_back_is_exactly_what_could_begin_a_stop_string(stops: list[str], deltas: list[str]) -> None:
    search = StopStrings(stops, include_in_output=False)
    text = emitted = ""
    for delta in deltas:
        text += delta
        given_out, matched = search.push(delta)
        emitted += given_out
        if matched is not None:
            return
        beginnings = [n for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in stops)]
        assert len(emitted) == min(beginnings, default=len(text))


def test_text_through_the_match_is_emitted_on_request() -> None:
    assert streamed(["END"], ["one E", "ND two"], include=True) == ("one END", "END")
    assert streamed(["END"], ["one E", "ND two"], include=False) == ("one ", "END")


def test_match_that_ends_first_wins_and_then_the_first_listed() -> None:
    assert streamed(["abcd", "bc"], ["abcd"]) == ("a", "bc")
    assert streamed(["b", "ab"], ["ab"]) == ("a", "b")
    assert streamed(["ab", "b"], ["ab"]) == ("", "ab")


def test_beginning_that_comes_to_nothing_is_given_out() -> None:
    search = StopStrings(["</tool>"], include_in_output=False)
    assert search.push("see <") == ("see ", None)
    assert search.push("/to") == ("", None)
    assert search.push("p>") == ("</top>", None)


def test_flush_gives_the_held_beginning_once() -> None:
    search = StopStrings(["###"], include_in_output=False)
    assert search.push("end ##") == ("end ", None)
    assert search.flush() == "##"
    assert search.flush() == ""


def test_ignored_text_neither_matches_nor_begins_a_match() -> None:
    search = StopStrings(["stop"], include_in_output=False)
    assert search.ignore("do not stop, st") == "do not stop, st"
    assert search.push("op, now st") == ("op, now ", None)
    assert search.push("op!") == ("", "stop")


def test_ignoring_gives_out_what_was_held_back() -> None:
    search = StopStrings(["stop"], include_in_output=False)
    assert search.push("a st") == ("a ", None)
    assert search.ignore("op") == "stop"


def test_nothing_comes_after_a_match() -> None:
    search = StopStrings(["."], include_in_output=False)
    assert search.push("one. two") == ("one", ".")
    assert search.push("three") == ("", ".")
    assert search.flush() == ""


@pytest.mark.parametrize("include", [True, False])
def test_without_stop_strings_everything_passes(include: bool) -> None:
    assert streamed([], ["a", "", "b"], include=include) == ("ab", None)
