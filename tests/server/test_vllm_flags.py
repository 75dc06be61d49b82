"""The table of vLLM's flags: whatever an existing compose file holds gets an answer that says what to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kvpage_server.server_flags import make_parser
from kvpage_server.vllm_flag_table import IGNORED, IMPLEMENTED, REFUSED, SHORTS
from kvpage_server.vllm_flags import FLAGS, explain_unknown_flag, flag_reference

GROUPS = (*IMPLEMENTED, *IGNORED, *REFUSED)
VLLM_FLAGS = (Path(__file__).parent / "vllm_serve_flags.txt").read_text(encoding="utf-8").split()
"""What `vllm serve --help=all` of 0.32.0 lists."""
HERE = {name for group in IMPLEMENTED for name in group.names()}
OF_EVERY_COMMAND = {"--log-level"}


@pytest.mark.parametrize("flag", VLLM_FLAGS)
def test_every_flag_of_vllm_has_a_row(flag: str) -> None:
    name = SHORTS.get(flag, flag)
    assert name in HERE or name in FLAGS


def test_the_parser_of_serve_takes_what_the_table_calls_implemented_and_nothing_else_of_vllm() -> None:
    taken = set(make_parser().actions_by_flag())
    assert HERE - OF_EVERY_COMMAND - taken == set()
    assert taken & set(FLAGS) == set()
    assert taken & set(VLLM_FLAGS) - set(SHORTS) == HERE - OF_EVERY_COMMAND


def test_another_spelling_of_a_flag_that_is_here_is_told() -> None:
    answer = explain_unknown_flag("--device-memory-utilization", "0.9")
    assert answer is not None
    assert (answer.fate, answer.reason) == ("refused", "kvpage spells it --gpu-memory-utilization")


def test_no_flag_has_two_rows() -> None:
    counted = Counter(name for group in GROUPS for name in group.names())
    assert [name for name, rows in counted.items() if rows > 1] == []
    assert not set(SHORTS) & set(counted)


def test_every_flag_that_is_ignored_or_refused_has_a_reason() -> None:
    assert [group for group in (*IGNORED, *REFUSED) if len(group.reason.split()) < 3] == []
    assert [group.reason for group in GROUPS if group.reason.endswith(".")] == []


def test_values_that_ask_for_nothing_belong_to_flags_of_their_group() -> None:
    assert [group.off for group in GROUPS if not set(group.off) <= set(group.names())] == []


@pytest.mark.parametrize("spelling", ["-pp", "--pipeline-parallel-size"])
def test_a_refused_flag_says_what_is_missing(spelling: str) -> None:
    answer = explain_unknown_flag(spelling, "2")
    assert answer is not None
    assert (answer.fate, answer.values) == ("refused", 1)
    assert "pipeline parallelism has not landed yet" in answer.reason


@pytest.mark.parametrize(
    ("flag", "value"),
    [("-pp", "1"), ("--distributed-executor-backend", "mp"), ("--cpu-offload-gb", "0"), ("--runner", "generate")],
)  # fmt: skip
def test_a_refused_flag_that_asks_for_nothing_is_ignored(flag: str, value: str) -> None:
    answer = explain_unknown_flag(flag, value)
    assert answer is not None
    assert answer.fate == "ignored"


def test_a_feature_that_is_switched_off_is_ignored_and_takes_no_value() -> None:
    answer = explain_unknown_flag("--no-enable-lora")
    assert answer is not None
    assert (answer.fate, answer.values) == ("ignored", 0)


def test_only_switches_have_a_no_form() -> None:
    assert explain_unknown_flag("--no-pipeline-parallel-size") is None


@pytest.mark.parametrize(
    ("flag", "fate"),
    [("--speculative-config.method", "refused"), ("-sc.num_speculative_tokens", "refused"),
     ("--compilation-config.mode", "ignored"), ("-cc.cudagraph_mode", "ignored")],
)  # fmt: skip
def test_dotted_forms_are_answered_as_their_flag(flag: str, fate: str) -> None:
    answer = explain_unknown_flag(flag, "ngram")
    assert answer is not None
    assert (answer.fate, answer.values) == (fate, 1)


def test_an_optimization_level_is_a_flag_of_its_own() -> None:
    answer = explain_unknown_flag("-O3")
    assert answer is not None
    assert (answer.fate, answer.values) == ("ignored", 0)


def test_lists_take_all_words_up_to_the_next_flag() -> None:
    answer = explain_unknown_flag("--cudagraph-capture-sizes")
    assert answer is not None
    assert answer.values == -1


@pytest.mark.parametrize("flag", ["--max-modle-len", "--gpu", "-x", "--enable-lora.rank"])
def test_a_flag_that_vllm_does_not_have_either_is_unknown(flag: str) -> None:
    assert explain_unknown_flag(flag) is None


def test_the_reference_has_a_line_for_every_flag() -> None:
    page = flag_reference()
    assert [name for name in (*HERE, *FLAGS, *SHORTS) if f"`{name}`" not in page] == []
