"""Loading and wrapping tokenizers: the same ids and texts as transformers, nothing truncated, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers, processors

from kvpage.errors import CheckpointError, RequestError
from kvpage.text.detokenizer import Detokenizer
from kvpage.text.tokenizer import FastTokenizer, load_tokenizer, wrap_tokenizer

TEXTS = [
    "",
    " ",
    "The block pool",
    " two  spaces \n\n\tand tabs ",
    "Grüße 你好 한국어 👩‍👩‍👧 e\u0301",
    "<s>The<|im_start|> </s> <think>x日本",
    "def f(x):\n    return x ** 2  # ok",
]
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def fast(backend: Backend) -> FastTokenizer:
    return FastTokenizer(backend, special_tokens=SPECIALS, chat_templates={})


def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("name", ["byte_level", "llama2", "llama2_metaspace", "gemma", "unigram"])
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}]
)
def test_same_ids_and_texts_as_transformers(
    tmp_path: Path, backends: dict[str, Backend], name: str, flags: dict[str, bool]
) -> None:
    folder = save(tmp_path / "model", backends[name], **flags)
    ours, theirs = load_tokenizer(folder), oracle(folder)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.all_special_ids >= set(theirs.all_special_ids)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    assert ours.encode_batch(TEXTS) == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize(
    ("name", "cls"), [("llama2_metaspace", "LlamaTokenizer"), ("byte_level", "LlamaTokenizerFast")]
)
def test_same_ids_as_the_class_that_the_config_names(
    tmp_path: Path, backends: dict[str, Backend], name: str, cls: str
) -> None:
    folder = save(tmp_path / "model", backends[name], tokenizer_class=cls, add_bos_token=True)
    ours, theirs = load_tokenizer(folder), oracle(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_tokens_that_only_the_config_knows_get_transformers_ids(
    tmp_path: Path, backends: dict[str, Backend]
) -> None:
    end = backends["byte_level"].get_vocab_size()
    entry = {"content": "<late>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    folder = save(
        tmp_path / "model",
        backends["byte_level"],
        added_tokens_decoder={str(end): {**entry, "special": True}},
        pad_token={
            "content": "<pad>",
            "__type": "AddedToken",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        },
        additional_special_tokens=["<extra>"],
    )
    ours, theirs = load_tokenizer(folder), oracle(folder)
    text = "a <late>  b <extra><pad> c"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a b  c"


def test_special_tokens_map_counts_where_the_config_lists_none(
    tmp_path: Path, backends: dict[str, Backend]
) -> None:
    folder = save(tmp_path / "model", backends["byte_level"])
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>", "lstrip": False}})
    )
    ours = load_tokenizer(folder)
    assert ours.special_tokens == {"eos_token": "</s>"}
    assert ours.eos_token_id == backends["byte_level"].token_to_id("</s>")
    assert ours.bos_token_id is None


def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path, backends: dict[str, Backend]) -> None:
    backend = Backend.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(save(tmp_path / "model", backend))
    text = "The block pool hands out blocks"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("The")) < 10


def test_wrapped_tokenizer_shares_the_backend_without_changing_it(backends: dict[str, Backend]) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(backends["byte_level"].to_str())
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    theirs.chat_template = "{{ messages[0].content }}"
    ours = wrap_tokenizer(theirs)
    assert ours.chat_template == theirs.chat_template
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens["eos_token"] == "</s>"
    text = "The block pool hands out blocks"
    whole = ours.encode(text)
    theirs([text, "a"], truncation=True, max_length=4, padding="max_length")
    limits = theirs.backend_tokenizer.truncation
    assert limits is not None
    assert ours.encode(text) == whole
    assert theirs.backend_tokenizer.truncation == limits
    assert wrap_tokenizer(ours) is ours


@pytest.mark.parametrize("stored", ["string", "list", "file", "files"])
def test_chat_templates_are_found_wherever_they_are_stored(
    tmp_path: Path, backends: dict[str, Backend], stored: str
) -> None:
    entry: Any = {"string": "main", "list": [{"name": "default", "template": "main"}]}.get(
        stored, "not this one"
    )
    if stored == "list":
        entry.append({"name": "tool_use", "template": "tools"})
    folder = save(tmp_path / "model", backends["byte_level"], chat_template=entry)
    if stored.startswith("file"):
        (folder / "chat_template.jinja").write_text("main")
    if stored == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == "main"
    theirs = oracle(folder)
    assert tokenizer.chat_template_for(tools=False) == theirs.get_chat_template() == "main"
    expected = "tools" if stored in ("list", "files") else "main"
    assert tokenizer.chat_template_for(tools=True) == theirs.get_chat_template(tools=[{}]) == expected


def test_model_without_template_has_none(tmp_path: Path, backends: dict[str, Backend]) -> None:
    assert load_tokenizer(save(tmp_path / "model", backends["byte_level"])).chat_template is None


def test_token_text_is_what_the_token_adds_to_running_text(backends: dict[str, Backend]) -> None:
    for name in ("byte_level", "llama2", "gemma"):
        tokenizer = fast(backends[name])
        ids = tokenizer.encode("The block pool", add_special_tokens=False)
        assert "".join(map(tokenizer.token_text, ids)).lstrip() == "The block pool"
        assert b"".join(tokenizer.token_bytes(index) or b"" for index in ids).lstrip() == b"The block pool"
    special = tokenizer.encode("</s>", add_special_tokens=False)
    assert tokenizer.token_text(special[0]) == "</s>"


def test_token_text_of_half_a_code_point_is_a_replacement_character(backends: dict[str, Backend]) -> None:
    tokenizer = fast(backends["gemma"])
    lone = backends["gemma"].token_to_id("<0xE2>")
    assert tokenizer.token_text(lone) == tokenizer.decode([lone]) == "\ufffd"
    assert tokenizer.token_bytes(lone) == b"\xe2"


def test_token_text_follows_any_other_token_in_decode(backend: Backend, kind: str) -> None:
    if kind == "suffixed":  # a token's text depends on the next one
        return
    tokenizer = fast(backend)
    anchor = tokenizer.encode("The", add_special_tokens=False)
    before = backend.decode(anchor)
    for index in range(tokenizer.vocab_size):
        assert backend.decode([*anchor, index], skip_special_tokens=False) == before + tokenizer.token_text(
            index
        )


@pytest.mark.parametrize("prompt", ["a\ud800b", b"bytes", None, 3])
def test_what_is_no_text_is_a_request_error(backends: dict[str, Backend], prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        fast(backends["byte_level"]).encode(prompt)
    assert caught.value.param == "prompt"
    assert ("surrogate" in str(caught.value)) == isinstance(prompt, str)


def test_folder_without_tokenizer_names_folder_files_and_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    for word in (str(tmp_path), "tokenizer.json", "tokenizer.model", "tokenizer=", "skip_tokenizer_init"):
        assert word in str(caught.value)
    with pytest.raises(CheckpointError, match="not a folder"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_tokenizer_config_is_named(
    tmp_path: Path, backends: dict[str, Backend], content: str
) -> None:
    folder = save(tmp_path / "model", backends["byte_level"])
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"chat_template": [{"name": "default"}]},
        {"chat_template": 3},
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"999": "<x>"}},
        {"extra_special_tokens": 5},
    ],
)
def test_config_entry_of_the_wrong_form_is_a_checkpoint_error(
    tmp_path: Path, backends: dict[str, Backend], entry: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(save(tmp_path / "model", backends["byte_level"], **entry))


def test_folder_that_transformers_saved_loads_the_same(tmp_path: Path, backends: dict[str, Backend]) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backends["llama2"],
        **SPECIALS,
        pad_token="<pad>",
        extra_special_tokens=["<x>"],
        model_specific_special_tokens={"image_token": "<img>"},
        chat_template="{{ bos_token }}",
    )
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    text = "a b<x> <img><pad>  x"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.vocab_size, ours.chat_template) == (len(theirs), theirs.chat_template)
    assert ours.special_tokens.items() >= {"pad_token": "<pad>", "image_token": "<img>", **SPECIALS}.items()


def test_ids_may_come_in_any_sequence(backends: dict[str, Backend]) -> None:
    for name in ("byte_level", "llama2", "suffixed"):
        tokenizer = fast(backends[name])
        ids = tokenizer.encode("The block pool", add_special_tokens=False)
        for given in (tuple(ids), array("i", ids)):
            assert tokenizer.decode(given) == tokenizer.decode(ids)
            detokenizer = Detokenizer(tokenizer, given)
            assert detokenizer.push(given) + detokenizer.flush() != ""


def test_tokenizer_code_runs_only_when_trusted(tmp_path: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_tokenizer_json_is_read_through_transformers(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "th", "the", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the", add_special_tokens=False) == [vocabulary["the"]]
    assert tokenizer.decode(tokenizer.encode("the 你好 café")) == "the 你好 café"
    assert tokenizer.eos_token_id == vocabulary["<|endoftext|>"]


def test_slow_mode_reads_the_same_folder_through_transformers(
    tmp_path: Path, backends: dict[str, Backend]
) -> None:
    folder = save(tmp_path / "model", backends["byte_level"])
    assert load_tokenizer(folder, mode="slow").encode(TEXTS[4]) == load_tokenizer(folder).encode(TEXTS[4])


def test_tokenizer_json_is_read_without_transformers(tmp_path: Path, backends: dict[str, Backend]) -> None:
    folder = save(tmp_path / "model", backends["llama2"])
    code = (
        "import sys; from kvpage.text.tokenizer import load_tokenizer; "
        f"print(load_tokenizer({str(folder)!r}).encode('a')); "
        "sys.exit(bool({'transformers', 'torch', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_post_processor_decides_about_bos_and_eos(tmp_path: Path, backends: dict[str, Backend]) -> None:
    backend = Backend.from_str(backends["llama2"].to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = load_tokenizer(save(tmp_path / "model", backend, add_bos_token=False, add_eos_token=False))
    ids = tokenizer.encode("The block")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.encode("The block", add_special_tokens=False) == ids[1:-1]
