"""Flags follow the options they stand for, and forgive how they are typed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from kvpage.cli.flag_names import with_flags
from kvpage.config import EngineOptions
from kvpage.errors import RequestError
from kvpage.flags.engine import (
    NOT_ENGINE_FLAGS,
    NOT_SAMPLING_FLAGS,
    add_engine_flags,
    add_model_argument,
    add_sampling_flags,
    chosen_model,
    engine_options,
    sampling_params,
)
from kvpage.flags.fields import field_help
from kvpage.flags.parser import CommandParser, UsageError, human_integer
from kvpage.params import SamplingParams


def parser() -> CommandParser:
    made = CommandParser("kvpage test", "")
    add_model_argument(made)
    add_sampling_flags(made, max_tokens=77)
    add_engine_flags(made, skip=("seed",))
    return made


def options(*arguments: str) -> dict[str, object]:
    return engine_options(parser().parse_arguments(arguments))


@pytest.mark.parametrize(
    ("kind", "left_out"), [(EngineOptions, NOT_ENGINE_FLAGS), (SamplingParams, NOT_SAMPLING_FLAGS)]
)
def test_every_option_has_a_flag_with_a_help_text(kind: type, left_out: tuple[str, ...]) -> None:
    texts = field_help(kind)
    flags = parser().format_help()
    for field in fields(kind):
        assert texts.get(field.name), f"{field.name} is not described in the docstring of {kind.__name__}"
        if field.name not in left_out:
            assert "--" + field.name.replace("_", "-") in flags


def test_help_of_neighbours_on_one_line_is_told_apart() -> None:
    texts = field_help(EngineOptions)
    assert texts["max_num_seqs"] == "sequences that run at once"
    assert texts["max_num_batched_tokens"] == "tokens of one step"
    assert texts["num_kv_blocks"] == "KV blocks"


def test_help_shows_the_default_that_counts() -> None:
    text = " ".join(parser().format_help().split())
    assert "KV pool hold [77]" in text
    assert "share KV blocks between equal prefixes [on]" in text


def test_words_and_flags_may_come_in_any_order() -> None:
    made = CommandParser("kvpage test", "")
    made.add_argument("prompts", nargs="*")
    add_engine_flags(made)
    namespace = made.parse_arguments(["one", "--max-model-len", "64", "two"])
    assert namespace.prompts == ["one", "two"]
    assert engine_options(namespace) == {"max_model_len": 64}


def test_what_was_not_typed_leaves_no_value() -> None:
    assert options() == {}


def test_flags_are_typed_as_their_options() -> None:
    assert options("--max-model-len", "2k", "--gpu-memory-utilization=0.5", "--no-enable-prefix-caching",
                   "--kv-cache-memory", "2GiB", "-q", "awq", "-tp", "1") == {
        "max_model_len": 2000, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False,
        "kv_cache_memory": "2GiB", "quantization": "awq", "tensor_parallel_size": 1,
    }  # fmt: skip


def test_vllm_s_names_are_understood() -> None:
    assert options("--kv-cache-memory-bytes", "7", "--num-gpu-blocks-override", "8", "--max-model-len", "auto") == {
        "kv_cache_memory": "7", "num_kv_blocks": 8, "max_model_len": None,
    }  # fmt: skip


def test_underscores_and_hyphens_are_the_same() -> None:
    assert options("--max_model_len=64") == options("--max-model-len", "64")


def test_a_value_keeps_its_underscores_and_dashes() -> None:
    namespace = parser().parse_arguments(["my_model", "--tokenizer=a_b\u2013c"])
    assert chosen_model(namespace) == "my_model"
    assert engine_options(namespace)["tokenizer"] == "a_b\u2013c"


@pytest.mark.parametrize(
    ("dash", "name"), [("\u2013", "an en dash"), ("\u2014", "an em dash"), ("\u2013\u2013", "an en dash")]
)
def test_a_typographic_dash_is_named(dash: str, name: str) -> None:
    with pytest.raises(UsageError, match=rf"you typed {name}.*--tensor-parallel-size"):
        options(f"{dash}tensor-parallel-size", "2")


def test_a_prompt_may_begin_with_a_dash() -> None:
    made = CommandParser("kvpage test", "")
    made.add_argument("prompt")
    assert made.parse_arguments(["\u2014 he said, and left"]).prompt == "\u2014 he said, and left"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--max-modle-len", "--max-model-len"),
        ("--gpu-memory", "--gpu-memory-utilization"),
        ("--temprature", "--temperature"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest(typed: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown flag {typed}; did you mean {hint}\?"):
        options(typed, "1")


def test_too_many_words_suggest_quotes() -> None:
    with pytest.raises(UsageError, match="put quotes"):
        options("model", "another")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096),
        ("4k", 4000),
        ("4K", 4096),
        ("1.5k", 1500),
        ("-1.5k", -1500),
        ("2M", 2**21),
        ("9007199254740993", 9007199254740993),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_integers_as_people_write_them(text: str, number: int) -> None:
    assert human_integer(text) == number


@pytest.mark.parametrize("text", ["", "4q", "1.5", "k"])
def test_what_is_no_integer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a whole number"):
        options(f"--max-num-seqs={text}")


def test_sampling_flags_make_sampling_params() -> None:
    namespace = parser().parse_arguments(
        ["--temperature", "0.5", "--stop", "a", "--stop", "b", "--logit-bias", '{"5": -1}', "--ignore-eos",
         "--stop-token-ids", "3", "--stop-token-ids", "4", "--seed", "9"]
    )  # fmt: skip
    params = sampling_params(namespace, max_tokens=7)
    assert params == SamplingParams(max_tokens=7, temperature=0.5, stop=["a", "b"], logit_bias={5: -1.0},
                                    ignore_eos=True, stop_token_ids=[3, 4], seed=9)  # fmt: skip


def test_a_request_s_seed_is_no_option_of_the_engine() -> None:
    namespace = parser().parse_arguments(["--seed", "-1"])
    assert engine_options(namespace) == {}
    assert sampling_params(namespace) == SamplingParams(seed=-1)


@pytest.mark.parametrize("text", ["none", "None"])
def test_none_is_a_value_where_the_help_says_so(text: str) -> None:
    namespace = parser().parse_arguments(["--max-tokens", text, "--timeout", text, "--max-num-seqs", text])
    params = sampling_params(namespace, max_tokens=77)
    assert (params.max_tokens, params.timeout) == (None, None)
    assert engine_options(namespace) == {"max_num_seqs": None}
    assert "none = as many as" in " ".join(parser().format_help().split())


def test_none_is_refused_where_there_is_no_such_value() -> None:
    with pytest.raises(UsageError, match="not a whole number"):
        options("--max-logprobs", "none")


def test_a_list_takes_one_value_a_flag_and_leaves_the_prompt_alone() -> None:
    made = CommandParser("kvpage test", "")
    made.add_argument("prompts", nargs="*")
    add_sampling_flags(made, max_tokens=None)
    namespace = made.parse_arguments(["--allowed-token-ids", "27", "--allowed-token-ids", "28", "hi"])
    assert namespace.prompts == ["hi"]
    assert sampling_params(namespace) == SamplingParams(allowed_token_ids=[27, 28])


def test_each_penalty_explains_itself() -> None:
    text = " ".join(parser().format_help().split())
    assert "subtracted once from" in text
    assert "as often as" in text


def test_a_second_model_is_refused() -> None:
    with pytest.raises(UsageError, match="two models are named, this and --model that"):
        chosen_model(parser().parse_arguments(["this", "--model", "that"]))


def test_a_chat_template_is_text_or_the_name_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }} from a file", encoding="utf-8")
    assert options("--chat-template", str(file)) == {"chat_template": "{{ messages }} from a file"}
    assert options("--chat-template", "{% if a %}b{% endif %}") == {"chat_template": "{% if a %}b{% endif %}"}


def test_a_template_file_that_is_not_there_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nosuch\.jinja: there is no such file"):
        options("--chat-template", "nosuch.jinja")
    with pytest.raises(UsageError, match="cannot be read"):
        options("--chat-template", str(tmp_path))
    with pytest.raises(UsageError, match="cannot be read"):
        options("--chat-template", "x" * 5000)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("max_model_len=9 is beyond 8: use allow_long_max_model_len=True", "--max-model-len 9 is beyond 8: use --allow-long-max-model-len"),
        ("n=2 with temperature=0, or more", "--n 2 with --temperature 0, or more"),
        ("temperature must be above 0", "--temperature must be above 0"),
        ("device='cuda': none", "--device cuda: none"),
        ("enable_prefix_caching=False", "--no-enable-prefix-caching"),
        ("stop at the model's seed", "stop at the model's seed"),
        ("a/max_tokens and --max-num-seqs=3", "a/max_tokens and --max-num-seqs=3"),
    ],
)  # fmt: skip
def test_errors_name_the_flag_that_was_typed(message: str, told: str) -> None:
    assert with_flags(message, sampling=True) == told


def test_a_command_without_sampling_flags_names_none() -> None:
    assert with_flags("max_tokens=3, block_size=2", sampling=False) == "max_tokens=3, --block-size 2"


def test_sampling_flags_are_held_to_their_ranges() -> None:
    with pytest.raises(RequestError, match="temperature"):
        sampling_params(parser().parse_arguments(["--temperature", "-1"]))
    with pytest.raises(UsageError, match="JSON"):
        parser().parse_arguments(["--logit-bias", "5:1"])
