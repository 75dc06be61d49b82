"""The bundled checkpoint: its files, its tokenizer, its chat template, and a sample of its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from kvpage import demo
from kvpage.demo.corpus import BOS, END, ROLES, held_back, render_turn
from kvpage.demo.evaluate import oracle_generate, wrong

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read(name: str) -> Any:
    return json.loads((demo.path() / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo.path() / "tokenizer.json"))


def render(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    config = read("tokenizer_config.json")
    return environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=raise_exception,
        bos_token=config["bos_token"], eos_token=config["eos_token"],
    )  # fmt: skip


def test_all_files_are_there_and_take_at_most_8_megabytes() -> None:
    for name in FILES:
        assert (demo.path() / name).is_file()
    package = Path(demo.__file__).parent
    assert sum(file.stat().st_size for file in package.rglob("*") if file.suffix != ".pyc") <= 8_000_000


def test_the_config_names_a_llama_with_a_context_of_at_least_4096() -> None:
    config = read("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 4096
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_the_end_token_is_the_same_in_every_file(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END)
    assert read("config.json")["eos_token_id"] == end
    assert read("generation_config.json")["eos_token_id"] == [end]
    assert read("tokenizer_config.json")["eos_token"] == END


def test_plain_text_gets_exactly_one_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Paged attention is").ids
    assert ids[0] == tokenizer.token_to_id(BOS) == read("config.json")["bos_token_id"]
    assert ids.count(ids[0]) == 1


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("47+385", add_special_tokens=False).tokens
    assert [token for token in tokens if token != "+"] == ["4", "7", "3", "8", "5"]


@pytest.mark.parametrize("text", ["What is 7 + 8?", "  two  spaces\n", "naïve café, 東京 🙂", "a\tb"])
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_template_writes_what_the_model_was_trained_on(tokenizer: Tokenizer) -> None:
    turns = [
        ("system", "Be concise."),
        ("user", "Hello"),
        ("assistant", "Hello!"),
        ("user", "What is 1 + 2?"),
    ]
    text = render([{"role": role, "content": content} for role, content in turns])
    assert text == BOS + "".join(render_turn(role, content) for role, content in turns) + ROLES["assistant"]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids.count(tokenizer.token_to_id(BOS)) == 1
    assert ids.count(tokenizer.token_to_id(END)) == len(turns)


def test_the_template_takes_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Hello"}]
    assert render([{"role": "user", "content": parts}]) == render([{"role": "user", "content": "Hello"}])


def test_without_a_generation_prompt_the_template_ends_with_the_last_message() -> None:
    text = render([{"role": "user", "content": "Hello"}], add_generation_prompt=False)
    assert text == BOS + render_turn("user", "Hello")


def test_a_role_that_the_model_does_not_know_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="tool"):
        render([{"role": "tool", "content": "42"}])


def test_transformers_reads_the_tokenizer_and_its_template(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(demo.path())
    messages = [{"role": "user", "content": "What is 1 + 2?"}]
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == render(
        messages
    )
    assert loaded("Paged attention")["input_ids"] == tokenizer.encode("Paged attention").ids
    assert loaded.eos_token_id == tokenizer.token_to_id(END)


def test_a_sample_of_held_back_questions_is_answered_to_the_letter() -> None:
    """The whole evaluation is ``python -m kvpage.demo.evaluate``; this is a quick sample of it."""
    pytest.importorskip("transformers")
    examples = held_back(40, seed=7)
    mistakes = wrong(examples, oracle_generate(demo.path(), "float32"))
    assert len(mistakes) <= 4, mistakes
